"""What a process remembers of the snapshots it wrote saves reading, and changes nothing that is stored."""

import json

import numpy as np
import pytest

from recess.errors import Corrupt, NotFound
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.contract import RawPart
from recess.snapshots.keys import PAGEMAP
from recess.snapshots.recall import Recall
from recess.snapshots.rewrite import BUDGET_PAGES_MIN
from tests.unit.snapshots.helpers import Blobs, page, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
TOTAL = 4000
FIRST = {n: n + 1 for n in range(0, 1500, 2)}


def delta(content):
    part = raw("memory", TOTAL, content)
    return RawPart(part.name, part.pages_total, part.indices, part.data, inherits=True)


def write(store, parts, parent=""):
    return store.write(parts, b"vm", META, parent_id=parent)


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def store(blobs):
    store = Store(blobs)
    yield store
    store.close()


def test_a_store_that_forgot_writes_the_very_same(blobs, store):
    """A process that wrote the parent, and one that has to read it, make the same snapshot of the same pages."""
    base = write(store, [raw("memory", TOTAL, FIRST)]).snapshot_id
    change = {0: 7777, 2: 3, 600: 601, 602: 4242, 3999: 1}  # new, the parent's own, again the parent's, new, new
    mine = write(store, [delta(change)], base)
    fresh = Store(blobs)
    theirs = write(fresh, [delta(change)], base)
    expected = {n: page(v).tobytes() for n, v in (FIRST | change).items()}
    for one in (mine, theirs):
        assert read(store, one.snapshot_id, "memory", template=None) == expected
        store.verify(one.snapshot_id)
    assert store.manifest(mine.snapshot_id)["parts"]["memory"]["pages"] == TOTAL
    # Fingerprints find every page that is the parent's; without them scattered ones are not worth the decoding.
    assert mine.pages_shared["parent"] == 2
    assert mine.pages_shared["inherited"] == theirs.pages_shared["inherited"]
    json.dumps([dict(mine.pages_shared), mine.pages_new, mine.new_bytes])  # as the catalog keeps it
    fresh.close()


def test_equal_fingerprints_of_other_pages_are_not_believed(store, monkeypatch):
    monkeypatch.setattr("recess.snapshots.classify._KEYS", np.zeros(512, np.uint64))
    base = write(store, [raw("memory", TOTAL, FIRST)]).snapshot_id
    change = {0: 9, 2: 3, 4: 11}
    found = write(store, [delta(change)], base)
    assert found.pages_shared["parent"] == 1
    assert read(store, found.snapshot_id, "memory", template=None) == {
        n: page(v).tobytes() for n, v in (FIRST | change).items()
    }


def test_nothing_is_referred_to_that_is_gone(blobs, store):
    """The memory says that it is there, the store that it is not: the store is right."""
    base = write(store, [raw("memory", TOTAL, FIRST)]).snapshot_id
    (pack,) = [info.key for info in blobs.list_blobs(f"pagemaps/{PAGEMAP}")]
    (layer,) = [info.key for info in blobs.list_blobs("layers/")]
    content = blobs.get(layer, max_bytes=1 << 30)
    for key, data, error in ((layer, None, NotFound), (layer, content[:-1], Corrupt), (pack, None, NotFound)):
        kept = blobs.get(key, max_bytes=1 << 30)
        if data is None:
            blobs.delete(key)
        else:
            blobs.replace(key, data)
        with pytest.raises(error):
            write(store, [delta({0: 9})], base)
        blobs.put(key, kept)
        blobs.replace(key, kept)
    write(store, [delta({0: 9})], base)


def test_an_old_pack_that_is_rewritten_comes_out_whole(blobs, store):
    """Leaves that were not encoded, because they are known to be as they were, are when their pack is given up."""
    content = dict(FIRST)
    last = write(store, [raw("memory", TOTAL, content)]).snapshot_id
    for number in range(12):
        change = {n: 10_000 + 100 * number + n % 97 for n in range(512 * (number % 7), 512 * (number % 7) + 30)}
        content |= change
        last = write(store, [delta(change)], last).snapshot_id
        assert read(Store(blobs), last, "memory", template=None) == {n: page(v).tobytes() for n, v in content.items()}


def write_anew(blobs, parts, parent):
    """Write by a process that did not write the parent, and joins nothing after it."""
    store = Store(blobs)
    report = write(store, parts, parent)
    store.close()
    return report


def test_a_large_layer_is_emptied_over_several_snapshots(blobs, store):
    """What one snapshot writes anew is bounded, and in the end nothing of the sparse layer is left."""
    count = 3 * BUDGET_PAGES_MIN
    filler = np.zeros((count, 4096), np.uint8)
    filler.view(np.uint64)[:, 7] = np.arange(1, count + 1)
    everything = RawPart("memory", count, np.arange(count, dtype=np.uint32), filler)
    base = write(store, [everything])
    half = np.arange(int(count * 0.6), dtype=np.uint32)  # the layer is 40 % live after that: 1.2 budgets
    changed = filler[half].copy()
    changed.view(np.uint64)[:, 9] = 5
    budget = max(BUDGET_PAGES_MIN, 2 * len(half))
    assert count - len(half) < budget  # new pages make room for it at once
    whole = write_anew(blobs, [RawPart("memory", count, half, changed, inherits=True)], base.snapshot_id)
    assert len(store.manifest(whole.snapshot_id)["layers"]) == 1
    # The same in small steps: each change is far below the budget, the sparse layer is not.
    last, moved = base.snapshot_id, []
    for low in range(0, len(half), 512):
        step = half[low : low + 512]
        report = write_anew(blobs, [RawPart("memory", count, step, changed[low : low + 512], inherits=True)], last)
        last = report.snapshot_id
        moved.append(report.pages_new - len(step))
        store.verify(last)
    assert max(moved) <= BUDGET_PAGES_MIN
    layers = store.manifest(last)["layers"]
    assert all(file["live"] >= 0.5 * file["entries"] or file["live"] > BUDGET_PAGES_MIN for file in layers)
    expected = filler.copy()
    expected[half] = changed
    overlay = store.overlay(last, "memory", template=None)
    assert np.array_equal(overlay.data, expected[overlay.indices])
    assert len(overlay.indices) == count


def test_the_memory_is_bounded():
    recall = Recall(prints_bytes=100)
    for number in range(5):
        recall.note_layer(f"l{number}", np.zeros(5, np.uint64))
    assert [n for n in range(5) if recall.prints(f"l{n}") is not None] == [3, 4]
    recall.prints("l3")
    recall.note_layer("l5", np.zeros(5, np.uint64))
    assert recall.prints("l3") is not None  # used since
    assert recall.prints("l4") is None
    recall.note_layer("huge", np.zeros(50, np.uint64))
    assert recall.prints("huge") is None
    recall.note_layer("small", np.zeros(1, np.uint64))
    recall.note_layer("small", np.zeros(2, np.uint64))  # again: counted once
    recall.note_layer("more", np.zeros(10, np.uint64))
    assert recall.prints("small") is not None
