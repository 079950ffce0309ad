"""Layers packed for a journey: smaller, proven, found again, and the store they came from as it was."""

import io

import pytest

from recess.errors import BadInput, Corrupt, NotFound, OutOfSpace, Unavailable
from recess.frames import WorkPool
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.archive import Import, announce, archive_bytes, archive_pieces
from recess.snapshots.archive_v1 import ArchiveReader
from recess.snapshots.keys import key_of, recoded_key_of
from recess.snapshots.manifest_v1 import encode_manifest
from recess.snapshots.packing import Packing, as_announced, pack, worth_packing
from recess.snapshots.recompression import Recompression
from recess.snapshots.transfer import closure
from recess.testing.crash import crashing
from tests.golden.test_snapshot_formats import stored_files
from tests.unit.snapshots.helpers import ALIKE, ArrayTemplate, Blobs, pages, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
TOTAL = 400
UNDER = {n: ALIKE + n for n in range(100)}
OVER = {n: ALIKE + 500 + n for n in range(60)}
HARD = Packing(level=12, frame_bytes=64 * 4096)


class World:
    """A template and a snapshot over it, in small frames; an empty place for what is packed."""

    def __init__(self):
        self.blobs, self.packed = Blobs(), Blobs()
        self.store = Store(self.blobs, frame_bytes=2 * 4096)
        template = self.store.write([raw("memory", TOTAL, UNDER)], b"t", META).snapshot_id
        self.template = ArrayTemplate(template, {"memory": pages(*(UNDER.get(n, 0) for n in range(TOTAL)))})
        over = self.store.write([raw("memory", TOTAL, OVER)], b"s", META, template=self.template)
        self.ref = over.snapshot_id
        self.pool = WorkPool(2)
        self.told = []

    def pack(self, policy=HARD, **more):
        return pack(self.blobs, self.packed, self.ref, policy, self.pool, tell=self.told.append, **more)

    def layers(self):
        return sorted(item.key.rpartition("/")[2] for item in closure(self.blobs, self.ref) if "/lyr_" in item.key)

    def close(self):
        self.store.close()
        self.pool.close()


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def content(blobs):
    return {info.key: blobs.get(info.key, max_bytes=1 << 30) for info in blobs.list_blobs()}


def test_an_archive_of_packed_layers_is_smaller_and_comes_back_whole(world, tmp_path):
    before = content(world.blobs)
    head = announce(world.pack(), world.ref, "base:v1")
    assert archive_bytes(head) < archive_bytes(announce(world.blobs, world.ref, "base:v1"))
    assert len(world.told) == 2
    assert content(world.blobs) == before
    data = b"".join(archive_pieces(as_announced(world.blobs, world.packed, head), head))
    assert len(data) == archive_bytes(head)
    there = Blobs()
    Import(there, ArchiveReader(io.BytesIO(data).read), tmp_path, lambda: 1 << 40, lambda *_: None).run(tell=print)
    store = Store(there)
    assert store.verify(world.ref)["manifests"] == 2
    assert read(store, world.ref, "memory", template=world.template) == read(
        world.store, world.ref, "memory", template=world.template
    )
    store.close()


def test_who_has_the_layers_already_takes_none_in(world, tmp_path):
    """The forms differ, the id does not."""
    head = announce(world.pack(), world.ref, "")
    data = b"".join(archive_pieces(as_announced(world.blobs, world.packed, head), head))
    report = Import(
        world.blobs, ArchiveReader(io.BytesIO(data).read), tmp_path, lambda: 1 << 40, lambda *_: None
    ).run(tell=print)  # fmt: skip
    assert report.blobs_sent == 0


def test_the_same_again_costs_nothing_and_gives_the_same_bytes(world):
    head = announce(world.pack(), world.ref, "")
    world.packed.put_stream = lambda *_: pytest.fail("it was packed again")
    assert announce(world.pack(), world.ref, "") == head


def test_an_export_goes_on_after_what_was_packed_is_gone(world):
    head = announce(world.pack(), world.ref, "")
    data = b"".join(archive_pieces(as_announced(world.blobs, world.packed, head), head))
    for key in list(content(world.packed)):
        world.packed.delete(key)
    again = announce(world.pack(), world.ref, "")
    assert again == head
    rest = archive_pieces(as_announced(world.blobs, world.packed, again), again, start=5000)
    assert b"".join(rest) == data[5000:]


def test_layers_of_many_threads_are_those_of_one(world):
    world.pack()
    alone, world.packed, world.pool = content(world.packed), Blobs(), WorkPool(1)
    world.pack()
    assert content(world.packed) == alone


def test_a_recompressed_layer_is_packed_from_that(world):
    world.store.recompress(
        Recompression(after_s=1.0, level=12, frame_bytes=8 * 4096), now=1e12, stopped=lambda: False, tell=print
    )
    assert not any(world.blobs.exists(key_of(layer)) for layer in world.layers())
    head = announce(world.pack(), world.ref, "")
    assert any(item.size_bytes == world.packed.stat(item.key).size_bytes for item in head.items if "rec" in item.key)
    data = b"".join(archive_pieces(as_announced(world.blobs, world.packed, head), head))
    assert len(data) == archive_bytes(head)


def test_what_becomes_no_smaller_goes_as_it_is_stored(world):
    view = world.pack(Packing(level=-50, frame_bytes=4096))
    assert closure(view, world.ref) == closure(world.blobs, world.ref)
    assert sorted(content(world.packed)) == [recoded_key_of(layer) for layer in world.layers()]  # tried once only


def test_only_so_much_is_packed():
    sizes = {"a": 30, "b": 10, "c": 60}
    assert worth_packing(sizes, Packing(content_bytes_max=40)) == ["b", "a"]
    assert worth_packing(sizes, Packing(content_bytes_max=9)) == []
    assert worth_packing({}, Packing()) == []


@pytest.mark.parametrize("bad", [{"level": 23}, {"level": -51}, {"frame_bytes": 0}, {"frame_bytes": 5 << 20}])
def test_a_policy_that_cannot_be(bad):
    with pytest.raises(BadInput):
        Packing(**bad)


def test_a_layer_of_an_old_version_goes_as_it_is():
    """It proves no other coding of itself."""
    blobs, manifest = stored_files()
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    ref, data = encode_manifest(type(manifest)(**{**fields, "template": ""}))
    blobs.put(key_of(ref), data)
    pool, packed = WorkPool(1), Blobs()
    view = pack(blobs, packed, ref, HARD, pool, tell=print)
    assert closure(view, ref) == closure(blobs, ref)
    assert content(packed) == {}
    pool.close()


def test_a_full_disk_is_no_hindrance(world, monkeypatch):
    def full(*_):
        raise OutOfSpace("no space")

    monkeypatch.setattr(world.packed, "put_stream", full)
    assert closure(world.pack(), world.ref) == closure(world.blobs, world.ref)


def test_a_damaged_layer_is_named_and_never_packed(world):
    layer = world.layers()[0]
    good = world.blobs.get(key_of(layer), max_bytes=1 << 30)
    world.blobs.replace(key_of(layer), good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
    with pytest.raises(Corrupt, match=layer[:16]):
        world.pack()
    assert recoded_key_of(layer) not in content(world.packed)


@pytest.mark.parametrize("point", ["packing.before_file", "packing.before_check"])
def test_a_crash_leaves_nothing_that_is_not_proven(world, point):
    with crashing(point):
        world.pack()
    head = announce(world.pack(), world.ref, "")
    data = b"".join(archive_pieces(as_announced(world.blobs, world.packed, head), head))
    assert len(data) == archive_bytes(head)


def test_a_packed_layer_that_was_damaged_is_made_anew(world):
    head = announce(world.pack(), world.ref, "")
    key = recoded_key_of(world.layers()[0])
    good = world.packed.get(key, max_bytes=1 << 30)
    world.packed.replace(key, good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
    assert announce(world.pack(), world.ref, "") == head
    assert world.packed.get(key, max_bytes=1 << 30) == good


def test_a_disk_that_gives_back_something_else_is_told_of(world, monkeypatch):
    put = world.packed.put_stream

    def damaging(key, source):
        put(key, source)
        good = world.packed.get(key, max_bytes=1 << 30)
        world.packed.replace(key, good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
        return True

    monkeypatch.setattr(world.packed, "put_stream", damaging)
    with pytest.raises(Corrupt, match="does not read back"):
        world.pack()
    assert content(world.packed) == {}


def test_a_server_that_ends_stops_it(world):
    def go_on():
        raise Unavailable("the server ends")

    with pytest.raises(Unavailable):
        world.pack(go_on=go_on)
    assert content(world.packed) == {}


def test_the_form_that_is_not_packed_is_not_seen(world):
    view = world.pack()
    layer = world.layers()[0]
    assert not view.exists(key_of(layer))
    assert view.exists(recoded_key_of(layer))
    for read_it in (view.stat, lambda key: view.get(key, max_bytes=9), lambda key: view.get_range(key, 0, 1)):
        with pytest.raises(NotFound):
            read_it(key_of(layer))
    assert view.get_ranges(recoded_key_of(layer), [(0, 4)]) == [world.packed.get_range(recoded_key_of(layer), 0, 4)]
    assert view.get(key_of(world.ref), max_bytes=1 << 22) == world.blobs.get(key_of(world.ref), max_bytes=1 << 22)
