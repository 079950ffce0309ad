"""Several homes over one store: nobody deletes what another needs, and a damaged copy is fetched anew."""

import pytest

from recess.blobs import CachingBlobs, LocalBlobs, MemoryBlobs
from recess.errors import BadInput, Corrupt, NotFound
from recess.snapshots import SnapshotMeta
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.keys import key_of
from recess.snapshots.shared import Refs, SharedStore
from recess.testing.crash import crashing
from tests.unit.snapshots.helpers import raw

A, B = "aaaaaaaa", "bbbbbbbb"
GRACE = 600.0


class Clock:
    now = 1_700_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def blobs(clock):
    return MemoryBlobs(now=clock)


@pytest.fixture
def homes(blobs):
    made = SharedStore(blobs, A), SharedStore(blobs, B)
    yield made
    for store in made:
        store.close()


def write(store, number, **how):
    meta = SnapshotMeta(fingerprint={}, spec={"number": number})
    return store.write([raw("memory", 16, {1: number, 2: number + 1})], b"state", meta, **how).snapshot_id


def sweep(store, clock, live, **how):
    clock.now += 2 * GRACE
    return store.collect(live, grace_s=GRACE, now=clock.now, **how)


def test_a_sweep_spares_what_another_home_has(homes, clock, blobs):
    a, b = homes
    mine, theirs = write(a, 1), write(b, 10)
    sweep(a, clock, [mine])
    assert a.verify(mine)
    assert b.verify(theirs)
    counts = sweep(b, clock, [])  # b has let go of its own
    assert counts["manifests"] == 1
    assert a.verify(mine)
    with pytest.raises(NotFound):
        b.manifest(theirs)


def test_what_two_homes_have_goes_with_the_second(homes, clock, blobs):
    a, b = homes
    shared = write(a, 1)
    b.refs.hold(shared)
    sweep(a, clock, [])
    assert b.verify(shared)
    sweep(b, clock, [])
    assert [i.key for i in blobs.list_blobs()] == []


def test_a_discard_waits_for_the_sweep(homes, clock):
    a, b = homes
    shared = write(a, 1)
    b.refs.hold(shared)
    a.discard(shared)
    assert b.verify(shared)
    b.discard(shared)
    assert sweep(b, clock, [])["manifests"] == 1


def test_the_reference_is_there_before_the_manifest(homes, clock, blobs):
    a, b = homes
    with crashing("snapshot.before_manifest"):
        write(a, 1)
    seen = []

    class Watching(MemoryBlobs):
        def put(self, key, data):
            seen.append(key)
            return super().put(key, data)

    store = SharedStore(Watching(), A)
    snapshot = write(store, 1)
    store.close()
    assert seen.index(f"refs/{A}/{snapshot}") < seen.index(key_of(snapshot))
    assert sweep(b, clock, [])["files"] > 0  # the crash left files, and no manifest


def test_a_lost_reference_comes_back_with_the_next_sweep(homes, clock, blobs):
    a, b = homes
    mine = write(a, 1)
    blobs.delete(f"refs/{A}/{mine}")
    sweep(a, clock, [mine])
    sweep(b, clock, [])
    assert a.verify(mine)


def test_a_reference_to_nothing_harms_nobody(homes, clock):
    a, b = homes
    mine = write(a, 1)
    b.refs.hold("snp_" + "0" * 64)
    sweep(a, clock, [mine])
    assert a.verify(mine)


def test_what_may_be_wanted_keeps_its_reference(homes, clock):
    a, b = homes
    doubtful = write(a, 1)
    sweep(a, clock, [], wanted=[doubtful])
    sweep(b, clock, [])
    assert a.verify(doubtful)


def test_names_are_found_from_elsewhere_and_move(homes, clock, blobs):
    a, b = homes
    old, new = write(a, 1), write(a, 5)
    a.refs.give_name("base:v1", old, clock.now)
    assert b.find("base:v1") == old
    a.refs.give_name("base:v1", new, clock.now + 1)
    assert b.find("base:v1") == new
    assert b.find(new[:20]) == new
    with pytest.raises(NotFound):
        b.find("base:v2")
    sweep(a, clock, [old])
    assert b.find("base:v1") == old  # the newer is gone
    sweep(a, clock, [])
    with pytest.raises(NotFound):
        b.find("base:v1")
    assert list(blobs.list_blobs("names/")) == []


@pytest.mark.parametrize("owner", ["", "short", "UPPERCASE", "a/b/c/d/e", "x" * 65])
def test_what_is_no_home(owner):
    with pytest.raises(BadInput):
        Refs(MemoryBlobs(), owner)


def damage(cache, key):
    path = cache._local.root / key
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_store_is_not_believed(tmp_path, blobs):
    cache = CachingBlobs(blobs, LocalBlobs(tmp_path), checked_pieces, max_bytes=1 << 20, whole_max_bytes=1 << 20)
    store = SharedStore(cache, A, cache=cache)
    snapshot = write(store, 1)
    assert store.fetch_bytes(snapshot) == 0
    held = [i.key for i in blobs.list_blobs() if not i.key.startswith("refs/")]
    for key in held:
        damage(cache, key)
    assert store.manifest(snapshot)["template"] == ""
    assert store.vmstate(snapshot) == b"state"
    assert len(store.overlay(snapshot, "memory", template=None).indices) == 2
    for key in held:
        cache.drop(key)
    assert store.fetch_bytes(snapshot) == sum(blobs.stat(k).size_bytes for k in held if k != key_of(snapshot))
    layer = next(k for k in held if k.startswith("layers/"))
    bad = bytearray(blobs.get(layer, max_bytes=1 << 20))
    bad[10] ^= 1
    blobs.delete(layer)
    blobs.put(layer, bad)
    with pytest.raises(Corrupt):
        store.overlay(snapshot, "memory", template=None)
    assert cache.missing_bytes([(layer, 1)]) == 1
    store.close()
