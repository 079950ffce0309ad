"""Recompression: the decision, the swap, and that nobody who reads, writes, shares or carries a layer away notices."""

import threading
import time

import numpy as np
import pytest

from recess.blobs import MemoryBlobs
from recess.errors import BadInput, Corrupt, NotFound
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.contract import RawPart
from recess.snapshots.forms import open_layer
from recess.snapshots.keys import key_of, recoded_key_of
from recess.snapshots.lineage import shares, tree_parents
from recess.snapshots.recompression import Recompression, StoredLayer, due
from recess.snapshots.shared import SharedStore
from recess.snapshots.transfer import check_there, closure, copy_snapshot
from recess.testing.crash import crashing
from tests.golden.test_snapshot_formats import SNAPSHOT, stored_files
from tests.unit.snapshots.helpers import ALIKE, Blobs, damage_each, page, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
MEMORY = {n: ALIKE + n for n in range(40)}
HARD = Recompression(after_s=60.0, level=12, frame_bytes=8 * 4096)


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def store(blobs):
    store = Store(blobs, frame_bytes=2 * 4096)
    yield store
    store.close()


def write(store, content=MEMORY, **how):
    return store.write([raw("memory", 2000, content)], b"vm", META, **how).snapshot_id


def round_of(store, policy=HARD, *, later=1000.0, stopped=lambda: False, told=None):
    return store.recompress(
        policy, now=time.time() + later, stopped=stopped, tell=([] if told is None else told).append
    )


def layer_of(store, ref):
    (layer,) = store.manifest(ref)["layers"]
    return layer["id"]


def content_of(store, ref):
    return read(store, ref, "memory", template=None)


def bytes_of(content):
    return {n: page(v).tobytes() for n, v in content.items() if v}


# --- the decision ----------------------------------------------------------------------------------------------------


def stored(name, used=0.0, size=100):
    return StoredLayer(name, used, size)


def test_what_sleeps_long_is_due_the_largest_first():
    layers = [stored("a", 0, 10), stored("b", 0, 30), stored("c", 941, 99), stored("d", 939, 20), stored("e", 0, 0)]
    assert [one.id for one in due(layers, HARD, now=1000.0)] == ["b", "d", "a"]
    assert due(layers, Recompression(after_s=0.0), now=1000.0) == []


@pytest.mark.parametrize("bad", [{"level": 23}, {"level": -51}, {"frame_bytes": 0}, {"frame_bytes": 5 << 20}])
def test_a_policy_that_cannot_be(bad):
    with pytest.raises(BadInput):
        Recompression(**bad)


# --- the swap --------------------------------------------------------------------------------------------------------


def test_a_layer_that_sleeps_is_swapped_and_reads_the_same(store, blobs):
    ref = write(store)
    layer, manifest, before = layer_of(store, ref), store.manifest(ref), store.used_bytes()
    assert round_of(store, later=0.0) == {"recompressed": 0, "bytes": 0}  # too young
    counts = round_of(store)
    assert counts["recompressed"] == 1
    assert before - store.used_bytes() == counts["bytes"]
    assert not blobs.exists(key_of(layer))
    assert blobs.exists(recoded_key_of(layer))
    assert store.manifest(ref) == manifest
    assert content_of(store, ref) == bytes_of(MEMORY)
    store.verify(ref)
    assert open_layer(blobs, layer, 0).table.level == 1  # of the layer as it was written
    assert round_of(store) == {"recompressed": 0, "bytes": 0}  # no cost is paid twice


def test_a_layer_in_use_by_a_young_snapshot_stays(store, blobs):
    old = write(store)
    blobs.age(500)
    write(store, MEMORY | {3: 99}, parent_id=old)
    assert round_of(store, later=0.0)["recompressed"] == 0


def test_all_who_share_a_layer_go_on(store, blobs):
    changed = {n: 50 + n % 2 for n in range(500, 516)} | {3: 99} | {n: ALIKE + n for n in range(600, 616)}
    one = write(store)
    two = write(store, MEMORY | changed, parent_id=one)
    assert round_of(store)["recompressed"] == 2
    three = write(store, MEMORY | changed | {4: 98}, parent_id=two)  # refers to slots of layers that were recompressed
    assert len(store.manifest(three)["layers"]) == 3
    assert content_of(store, one) == bytes_of(MEMORY)
    assert content_of(store, two) == bytes_of(MEMORY | changed)
    assert content_of(store, three) == bytes_of(MEMORY | changed | {4: 98})
    for ref in (one, two, three):
        store.verify(ref)
    store.discard(one)
    store.collect([three], grace_s=-10, now=time.time())
    assert content_of(store, three) == bytes_of(MEMORY | changed | {4: 98})
    store.discard(three)
    assert [info.key for info in blobs.list_blobs() if "lyr_" in info.key] == []


def test_the_same_layer_written_again(store, blobs):
    ref = write(store)
    round_of(store)
    assert write(store, parent_id="") == ref
    layer = layer_of(store, ref)
    assert blobs.exists(key_of(layer))  # both forms: the one as written is read
    assert content_of(store, ref) == bytes_of(MEMORY)
    assert round_of(store)["recompressed"] == 1
    assert not blobs.exists(key_of(layer))
    assert content_of(store, ref) == bytes_of(MEMORY)


def test_a_reader_in_the_middle_goes_on(store, blobs):
    ref = write(store)
    record = store.manifest(ref)["layers"][0]
    reader = open_layer(blobs, record["id"], record["bytes"])
    first = reader.frame(0)
    round_of(store)
    assert not blobs.exists(key_of(record["id"]))
    assert first + b"".join(reader.frame(n) for n in range(1, 20)) == b"".join(bytes_of(MEMORY).values())
    blobs.delete(recoded_key_of(record["id"]))
    with pytest.raises(NotFound):
        open_layer(blobs, record["id"], record["bytes"])


def test_a_write_that_found_the_old_form_keeps_it(store, blobs):
    ref = write(store)
    layer = layer_of(store, ref)
    with store.holding([key_of(layer)]):
        counts = round_of(store)
        assert blobs.exists(key_of(layer))
    assert counts == {"recompressed": 1, "bytes": 0}
    assert round_of(store)["bytes"] != 0
    assert not blobs.exists(key_of(layer))


def noise(store):
    """A snapshot whose pages no level can make smaller."""
    data = np.random.default_rng(3).integers(0, 256, (40, 4096), np.uint8)
    part = RawPart("memory", 2000, np.arange(40, dtype=np.uint32), data)
    return store.write([part], b"vm", META).snapshot_id


def test_no_layer_becomes_larger(store, blobs):
    ref = noise(store)
    before = {info.key: info.size_bytes for info in blobs.list_blobs()}
    assert round_of(store) == {"recompressed": 0, "bytes": 0}
    assert {info.key: info.size_bytes for info in blobs.list_blobs()} == before
    store.verify(ref)


def test_what_was_tried_in_vain_is_not_tried_again(store, blobs, monkeypatch):
    noise(store)
    round_of(store)
    monkeypatch.setattr(blobs, "put_stream", lambda *_: pytest.fail("it was compressed again"))
    assert round_of(store) == {"recompressed": 0, "bytes": 0}


def test_a_larger_form_that_a_crash_left_goes(store, blobs):
    """It was put, and the process ended before it was looked at: the next one takes the smaller of the two."""
    layer = layer_of(store, noise(store))
    with crashing("recompress.before_check"):
        round_of(store)
    assert blobs.exists(recoded_key_of(layer))
    after = Store(blobs)
    assert round_of(after) == {"recompressed": 0, "bytes": 0}
    assert not blobs.exists(recoded_key_of(layer))
    assert blobs.exists(key_of(layer))
    after.close()


def test_told_to_stop_it_leaves_everything_as_it_was(store, blobs):
    ref = write(store)
    before = {info.key for info in blobs.list_blobs()}
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) > 3

    assert round_of(store, stopped=stopped) == {"recompressed": 0, "bytes": 0}
    assert {info.key for info in blobs.list_blobs()} == before
    assert content_of(store, ref) == bytes_of(MEMORY)


def test_over_the_budget_no_further_layer_is_begun(store):
    write(store)
    write(store, {n: ALIKE + 77 + n for n in range(20)})
    assert round_of(store, Recompression(after_s=1.0, level=1, budget_s=-1.0))["recompressed"] == 0
    assert round_of(store)["recompressed"] == 2


def test_it_runs_beside_its_caller(store):
    write(store)
    names = []
    store.recompress(
        HARD, now=time.time() + 1000, stopped=lambda: names.append(threading.current_thread().name), tell=print
    )
    assert {name.rpartition("_")[0] for name in names} == {"recompress"}


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_layer_is_told_of_and_left(store, blobs):
    few = {n: ALIKE + 70 + n for n in range(20)}
    ref, other = write(store), write(store, few)
    key = key_of(layer_of(store, ref))
    good = blobs.get(key, max_bytes=1 << 30)
    blobs.replace(key, good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    told = []
    assert round_of(store, told=told)["recompressed"] == 1
    assert len(told) == 1
    assert blobs.exists(key)
    assert not blobs.exists(recoded_key_of(layer_of(store, ref)))
    assert content_of(store, other) == bytes_of(few)
    with pytest.raises(Corrupt):
        content_of(store, ref)


def test_what_went_wrong_on_the_way_is_found_before_the_swap(store, blobs):
    ref = write(store)
    layer = layer_of(store, ref)
    key = recoded_key_of(layer)
    good = blobs.get(key_of(layer), max_bytes=1 << 30)
    round_of(store)
    bad = bytearray(blobs.get(key, max_bytes=1 << 30))
    bad[3000] ^= 4
    blobs.replace(key, bytes(bad))
    blobs.put(key_of(layer), good)  # as a crash before the swap leaves it, and a disk that has lost a bit since
    told = []
    assert round_of(store, told=told) == {"recompressed": 0, "bytes": 0}
    assert "does not match" in told[0] or "do not match" in told[0]
    assert blobs.exists(key_of(layer))
    assert content_of(store, ref) == bytes_of(MEMORY)
    assert round_of(store)["recompressed"] == 1  # made anew
    assert content_of(store, ref) == bytes_of(MEMORY)


def test_every_flipped_bit_of_a_recompressed_layer_is_noticed(store, blobs):
    content = {n: ALIKE + n for n in range(8)}
    ref = write(store, content)
    round_of(store)
    key = recoded_key_of(layer_of(store, ref))
    good = blobs.get(key, max_bytes=1 << 30)
    for _, bad in damage_each(good, every=max(1, len(good) // 300)):
        blobs.replace(key, bad)
        with pytest.raises(Corrupt):
            store.verify(ref)
        with pytest.raises(Corrupt):
            content_of(store, ref)
    blobs.replace(key, good)
    assert content_of(store, ref) == bytes_of(content)


def test_a_layer_of_an_old_version_stays_as_it_is(store):
    blobs, manifest = stored_files()
    old = Store(blobs)
    told = []
    assert round_of(old, told=told) == {"recompressed": 0, "bytes": 0}
    assert told == []
    assert blobs.exists(key_of(manifest.layers[0].id))
    assert SNAPSHOT in old.list_ids()
    old.close()


# --- bytes, travels, shared stores -----------------------------------------------------------------------------------


def test_the_tree_tells_what_is_really_stored(store, blobs):
    ref = write(store)
    round_of(store)
    shapes = store.shapes([ref])
    share = shares(shapes, tree_parents(shapes, {}))[ref]
    assert share.frees == store.used_bytes()
    assert store.discard(ref)["bytes"] == share.frees


@pytest.mark.parametrize("there", ["nothing", "as written"])
def test_a_recompressed_layer_travels(store, there):
    ref = write(store)
    other = Store(MemoryBlobs(), frame_bytes=2 * 4096)
    if there == "as written":
        write(other)
        other.blobs.delete(key_of(ref))
    round_of(store)
    assert any(item.key.startswith("recoded/") for item in closure(store.blobs, ref))
    report = copy_snapshot(store.blobs, other.blobs, ref, tell=lambda line: None)
    assert report.blobs_sent == (4 if there == "nothing" else 1)
    assert check_there(other.blobs, ref) > 0
    other.verify(ref)
    assert content_of(other, ref) == bytes_of(MEMORY)
    back = Store(MemoryBlobs())
    copy_snapshot(other.blobs, back.blobs, ref, tell=lambda line: None)
    assert content_of(back, ref) == bytes_of(MEMORY)
    other.close()
    back.close()


def test_a_shared_store_keeps_layers_as_they_were_written():
    blobs = MemoryBlobs()
    shared = SharedStore(blobs, "a" * 16)
    ref = write(shared)
    assert round_of(shared) == {"recompressed": 0, "bytes": 0}
    assert blobs.exists(key_of(layer_of(shared, ref)))
    shared.close()
