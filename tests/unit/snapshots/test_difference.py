"""Two snapshots compared page by page: the same numbers as comparing everything, in far less memory."""

import random
import tracemalloc

import numpy as np
import pytest

from recess.errors import BadInput, Incompatible
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.contract import PartDiff, RawPart
from recess.snapshots.layer_v1 import LayerReader
from tests.unit.snapshots.helpers import ArrayTemplate, Blobs, FileSource, page, pages, raw

META = SnapshotMeta(fingerprint={}, spec={})
TOTAL = 9000  # more than two windows
SOURCE = FileSource([page(n) for n in (901, 902, 903)])


def template(store, seed):
    base = np.zeros((TOTAL, 4096), np.uint8)
    for number in range(0, TOTAL, 97):
        base[number] = page(seed + number % 7)
    ref = store.write([RawPart("memory", TOTAL, np.arange(TOTAL, dtype=np.uint32), base)], b"t", META).snapshot_id
    return ArrayTemplate(ref, {"memory": base})


@pytest.fixture(scope="module")
def store():
    store = Store(Blobs())
    yield store
    store.close()


def whole(template, content):
    out = template.part("memory").copy()
    for number, what in content.items():
        out[number] = page(what)
    return out


def naive(left, right, left_base, right_base, listed):
    differ = (left != right).any(axis=1)
    there = right[differ]
    zeroed, reverted = (~there.any(axis=1)).sum(), (there == right_base[differ]).all(axis=1).sum()
    return PartDiff(TOTAL, listed, int(differ.sum()), int(zeroed), int(reverted))


@pytest.mark.parametrize("other_template", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_as_comparing_everything(store, seed, other_template):
    rng = random.Random(seed)
    one = template(store, 10)
    two = template(store, 12) if other_template else one
    mine = {rng.randrange(TOTAL): rng.choice([0, 1, 2, 10, 12, 901, 902]) for _ in range(300)}
    theirs = {**mine, **{rng.randrange(TOTAL): rng.choice([0, 3, 11, 903]) for _ in range(80)}}
    for number in rng.sample(sorted(theirs), 60):
        del theirs[number]
    left = store.write([raw("memory", TOTAL, mine)], b"l", META, template=one, sources=[SOURCE]).snapshot_id
    right = store.write(
        [raw("memory", TOTAL, theirs)], b"r", META, template=two, sources=[SOURCE], parent_id=left
    ).snapshot_id
    sides = [whole(one, mine), whole(two, theirs)]
    listed = {n for n in mine if (page(mine[n]) != one.part("memory")[n]).any()}
    listed |= {n for n in theirs if (page(theirs[n]) != two.part("memory")[n]).any()}
    found = store.difference(left, right, "memory", templates=(one, two), sources=[SOURCE])
    assert found == naive(*sides, one.part("memory"), two.part("memory"), len(listed))


def test_what_both_take_from_one_place_is_not_read(store, monkeypatch):
    base = store.write([raw("memory", TOTAL, {n: n + 1 for n in range(500)})], b"1", META).snapshot_id
    child = store.write([raw("memory", TOTAL, {n: n + 1 for n in range(1, 500)} | {0: 7})], b"2", META, parent_id=base)
    read = []
    visits = LayerReader.visits
    monkeypatch.setattr(
        LayerReader, "visits", lambda self, slots, act: (read.append(len(slots)), visits(self, slots, act))[1]
    )
    found = store.difference(base, child.snapshot_id, "memory", templates=(None, None))
    assert found == PartDiff(TOTAL, 500, 1, 0, 0)
    assert sum(read) == 2


def test_it_takes_little_memory(store):
    count = 30_000
    data = np.random.default_rng(1).integers(0, 255, (count, 4096), np.uint8)
    numbers = np.arange(count, dtype=np.uint32)
    left = store.write([RawPart("memory", count, numbers, data)], b"", META).snapshot_id
    data[:, 5] += 1
    right = store.write([RawPart("memory", count, numbers, data)], b"", META).snapshot_id
    tracemalloc.start()
    found = store.difference(left, right, "memory", templates=(None, None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.changed == count
    assert peak < data.nbytes  # both together are twice that; what it needs does not grow with them


def test_what_cannot_be_compared(store):
    small = store.write([raw("memory", 10, {1: 1})], b"", META).snapshot_id
    large = store.write([raw("memory", 11, {1: 1})], b"", META).snapshot_id
    with pytest.raises(BadInput):
        store.difference(small, large, "memory", templates=(None, None))
    with pytest.raises(Incompatible):
        store.difference(
            small, small, "memory", templates=(None, ArrayTemplate("snp_" + "1" * 64, {"memory": pages(1)}))
        )
