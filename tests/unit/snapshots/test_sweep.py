"""Garbage collection: nothing live goes, nothing dead stays, and doubt stops it."""

import threading
import time

import pytest

from recess.blobs import LocalBlobs
from recess.contextlog import DirectoryBodies
from recess.errors import Corrupt, HasDependents, NotFound
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.publish import Pins
from tests.unit.snapshots.helpers import ArrayTemplate, Blobs, page, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
HOUR = 3600.0


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def store(blobs):
    store = Store(blobs)
    yield store
    store.close()


def now(blobs):
    return max(info.modified_s for info in blobs.list_blobs())


def keys(blobs):
    return {info.key for info in blobs.list_blobs()}


def put(store, number, **more):
    return store.write([raw("memory", 20, {0: number, 1: 77})], b"%d" % number, META, **more).snapshot_id


def test_the_dead_go_and_the_living_stay(store, blobs):
    one = put(store, 1)
    two = put(store, 2, parent_id=one)
    three = put(store, 3)
    at = now(blobs)
    blobs.age(2 * HOUR)
    assert store.collect([one, two, three], grace_s=HOUR, now=at)["files"] == 0
    counts = store.collect([two], grace_s=HOUR, now=at)
    assert counts["manifests"] == 2
    assert counts["bytes"] > 0
    assert store.list_ids() == [two]
    store.verify(two)  # it refers to a page in the layer of `one`
    assert len([key for key in keys(blobs) if key.startswith("layers/")]) == 2
    assert store.collect([], grace_s=HOUR, now=at)["manifests"] == 1
    assert keys(blobs) == set()


def test_grace_keeps_the_young(store, blobs):
    one = put(store, 1)
    assert store.collect([], grace_s=HOUR, now=now(blobs) + HOUR - 1)["files"] == 0
    store.verify(one)


def test_a_young_manifest_keeps_old_files(store, blobs):
    """Its row may not be written yet; the layers it refers to may be old."""
    one = put(store, 1)
    blobs.age(2 * HOUR)
    two = put(store, 2, parent_id=one)
    store.collect([], grace_s=HOUR, now=now(blobs))
    assert store.list_ids() == [two]
    store.verify(two)


def test_the_template_lives_with_its_children(store, blobs):
    base = put(store, 1)
    template = ArrayTemplate(
        base, {"memory": raw("memory", 20, {n: (1, 77)[n] if n < 2 else 0 for n in range(20)}).data}
    )
    child = put(store, 2, template=template)
    at = now(blobs)
    blobs.age(2 * HOUR)
    store.collect([child], grace_s=HOUR, now=at)
    assert store.list_ids() == sorted([base, child])
    store.verify(child)


def test_an_unreadable_root_stops_everything(store, blobs):
    one, two, three = put(store, 1), put(store, 2), put(store, 3)
    at = now(blobs)
    blobs.age(2 * HOUR)
    key = f"manifests/{one}"
    good = blobs.get(key, max_bytes=1 << 20)
    blobs.replace(key, good[:-1] + b"x")
    before = keys(blobs)
    with pytest.raises(Corrupt):
        store.collect([two, one], grace_s=HOUR, now=at)
    with pytest.raises(NotFound):
        store.collect([two, "snp_" + "0" * 64], grace_s=HOUR, now=at)
    assert keys(blobs) == before
    store.collect([two], grace_s=HOUR, now=at)  # a damaged manifest that is dead is no reason
    assert store.list_ids() == [two]
    assert three != two


def test_others_blobs_are_none_of_its_business(store, blobs):
    blobs.put("log/entry", b"x")
    blobs.put("layers/readme", b"x")
    blobs.age(2 * HOUR)
    store.collect([], grace_s=0, now=now(blobs) + HOUR)
    assert keys(blobs) == {"log/entry", "layers/readme"}


def test_a_blob_renewed_since_it_was_listed_stays(store, blobs, monkeypatch):
    put(store, 1)
    at = now(blobs)
    blobs.age(2 * HOUR)
    listed = list(blobs.list_blobs())
    monkeypatch.setattr(blobs, "list_blobs", lambda prefix="": (i for i in listed if i.key.startswith(prefix)))
    blobs.age(-2 * HOUR)  # every blob was put again by another node
    assert store.collect([], grace_s=HOUR, now=at)["files"] == 0
    assert all(blobs.exists(info.key) for info in listed)


def test_what_a_running_write_refers_to_stays(blobs):
    """The parent dies and is swept while a child of it is being written: the child is whole all the same."""
    store = Store(blobs)
    one = put(store, 1)
    at = now(blobs)
    blobs.age(2 * HOUR)
    reached, swept = threading.Event(), threading.Event()
    real_put = blobs.put

    def slow_put(key, data):
        if key.startswith("manifests/"):
            reached.set()
            assert swept.wait(20)
        return real_put(key, data)

    blobs.put = slow_put
    made = []
    writer = threading.Thread(target=lambda: made.append(put(store, 2, parent_id=one)))
    writer.start()
    assert reached.wait(20)
    assert store.collect([], grace_s=HOUR, now=at)["manifests"] == 1
    swept.set()
    writer.join()
    assert store.list_ids() == made
    store.verify(made[0])
    assert read(store, made[0], "memory", template=None)[1] == page(77).tobytes()
    store.close()


def test_pins_outlast_the_write_while_a_sweep_runs():
    blobs, pins = Blobs(), Pins()
    for key in ("a", "b", "c"):
        blobs.put(key, b"")
    pins.hold(["a", "a"])
    pins.release(["a"])
    assert not pins.delete(blobs, "a")
    with pins.sweep():
        pins.release(["a"])
        assert not pins.delete(blobs, "a")
        assert pins.delete(blobs, "b")
    assert pins.delete(blobs, "a")
    pins.hold(["c"])
    assert pins.delete(blobs, "c", own=1)


def test_what_is_only_wanted_is_kept_if_it_is_there(store, blobs):
    """The log may name a snapshot that was removed since; one that is there stays, whatever the rows say."""
    one, two = put(store, 1), put(store, 2)
    at = now(blobs)
    blobs.age(2 * HOUR)
    store.collect([], wanted=[one, "snp_" + "0" * 64, "", "rubbish"], grace_s=HOUR, now=at)
    assert store.list_ids() == [one]
    store.verify(one)
    with pytest.raises(NotFound):
        store.collect([two], wanted=[two], grace_s=HOUR, now=at)
    blobs.replace(f"manifests/{one}", b"x")
    with pytest.raises(Corrupt):
        store.collect([], wanted=[one], grace_s=HOUR, now=at)


def test_discard_takes_one_snapshot_at_once_and_nothing_of_others(store, blobs):
    one = put(store, 1)
    two = put(store, 2, parent_id=one)
    counts = store.discard(one)
    assert counts["manifests"] == 1
    assert store.list_ids() == [two]
    store.verify(two)  # its page 1 is in the layer of `one`, which therefore stayed
    assert store.discard(two)["files"] == 4  # both layers, its own page maps and device state
    assert keys(blobs) == set()
    assert store.discard(two) == {"manifests": 0, "files": 0, "bytes": 0}


def test_discard_refuses_a_template_and_stops_at_doubt(store, blobs):
    base = put(store, 1)
    template = ArrayTemplate(
        base, {"memory": raw("memory", 20, {n: (1, 77)[n] if n < 2 else 0 for n in range(20)}).data}
    )
    child, other = put(store, 2, template=template), put(store, 3)
    with pytest.raises(HasDependents):
        store.discard(base)
    blobs.replace(f"manifests/{other}", b"x")
    before = keys(blobs)
    with pytest.raises(Corrupt):
        store.discard(child)
    assert keys(blobs) == before
    assert store.discard(other)["manifests"] == 1  # a damaged one can be given up itself
    store.discard(child)
    store.verify(base)


def test_discard_leaves_what_a_running_write_uses(blobs):
    """The parent is discarded between a child's look at it and the child's manifest."""
    store = Store(blobs)
    one = put(store, 1)
    real_put, counts = blobs.put, []

    def put_then_discard(key, data):
        if key.startswith("manifests/"):
            counts.append(store.discard(one))
        return real_put(key, data)

    blobs.put = put_then_discard
    two = put(store, 2, parent_id=one)
    assert counts[0]["manifests"] == 1
    assert store.list_ids() == [two]
    store.verify(two)
    store.close()


def test_the_bodies_of_the_log_are_never_swept(tmp_path):
    """They may lie in the same folder, and the same blob store: the sweep looks only at names of its own."""
    blobs = LocalBlobs(tmp_path / "blobs")
    store = Store(blobs)
    for folder in ("log", "layers", "manifests"):
        bodies = DirectoryBodies(tmp_path / "blobs" / folder)
        kept = {bodies.put(bytes([n]) * 70_000): bytes([n]) * 70_000 for n in range(8)}
        store.collect([], grace_s=-HOUR, now=time.time() + 9 * HOUR)
        store.discard(put(store, 1))
        assert {digest: bodies.get(digest, 70_000) for digest in kept} == kept
    store.close()


@pytest.mark.parametrize("how", ["discard", "collect"])
def test_a_parent_that_goes_while_it_is_being_read_is_not_built_on(blobs, how):
    """Between the child's look at the manifest and its hold on the files: the write fails, and nothing refers to nothing."""
    store = Store(blobs)
    one = put(store, 1)
    at = now(blobs)
    blobs.age(2 * HOUR)
    real_get = blobs.get

    def get_then_lose(key, *, max_bytes):
        data = real_get(key, max_bytes=max_bytes)
        if key == f"manifests/{one}":
            blobs.get = real_get
            counts = store.discard(one) if how == "discard" else store.collect([], grace_s=HOUR, now=at)
            assert counts["files"] > 0
        return data

    blobs.get = get_then_lose
    with pytest.raises(NotFound):
        put(store, 2, parent_id=one)
    assert keys(blobs) == set()
    store.close()
