"""Moving snapshots between stores: only what is missing, checked, and the commit last."""

import pytest

from recess.blobs import MemoryBlobs, MeteredBlobs, read_pieces
from recess.errors import BadInput, Corrupt, NotFound, Unavailable
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.keys import key_of
from recess.snapshots.transfer import check_there, closure, copy_snapshot
from tests.unit.snapshots.helpers import ArrayTemplate, pages, raw

TOTAL = 64


def quiet(_line):
    return


class World:
    """A store with a template, a snapshot over it and a later one; the blobs beneath may be damaged."""

    def __init__(self):
        self.blobs = MemoryBlobs()
        self.store = Store(self.blobs)
        meta = SnapshotMeta(fingerprint={}, spec={})
        base = {n: 100 + n for n in range(32)}
        self.template = self.store.write([raw("memory", TOTAL, base)], b"tpl state", meta).snapshot_id
        whole = pages(*(base.get(n, 0) for n in range(TOTAL)))
        over = ArrayTemplate(self.template, {"memory": whole})
        first = {n: 200 + n for n in range(10)}
        self.first = self.store.write([raw("memory", TOTAL, first)], b"s1", meta, template=over).snapshot_id
        second = first | {40: 7}
        self.second = self.store.write(
            [raw("memory", TOTAL, second)], b"s2", meta, template=over, parent_id=self.first
        ).snapshot_id


@pytest.fixture(scope="module")
def world():
    made = World()
    yield made
    made.store.close()


def keys(blobs):
    return {info.key for info in blobs.list_blobs()}


def test_the_closure_ends_with_the_manifest_and_holds_the_template(world):
    items = closure(world.blobs, world.second)
    assert items[-1].key == key_of(world.second)
    at = [item.key for item in items].index(key_of(world.template))
    assert [item for item in items if item.is_manifest] == [items[at], items[-1]]
    assert all(world.blobs.stat(item.key).size_bytes == item.size_bytes for item in items)
    assert len(set(items)) == len(items)


def test_a_copy_is_whole(world):
    target = MemoryBlobs()
    report = copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert keys(target) == {item.key for item in closure(world.blobs, world.second)}
    assert report.blobs_sent == len(keys(target))
    assert report.blobs_there == 0
    store = Store(target)
    assert store.verify(world.second)["manifests"] == 2
    assert store.vmstate(world.second) == b"s2"
    store.close()
    assert check_there(target, world.second) == report.bytes_sent


def test_only_what_is_missing_travels(world):
    target = MeteredBlobs(MemoryBlobs())
    copy_snapshot(world.blobs, target, world.first, tell=quiet)
    before = target.traffic
    report = copy_snapshot(world.blobs, target, world.second, tell=quiet)
    own = {i.key for i in closure(world.blobs, world.second)} - {i.key for i in closure(world.blobs, world.first)}
    assert report.blobs_sent == len(own)
    assert (target.traffic - before).written_bytes == report.bytes_sent
    again = copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert (again.blobs_sent, again.bytes_sent) == (0, 0)


class Cut(MemoryBlobs):
    """Takes `left` blobs, then the line is dead."""

    left = 3

    def put_stream(self, key, source):
        if self.left == 0:
            raise Unavailable("the line is dead", retryable=True)
        self.left -= 1
        return super().put_stream(key, source)


def test_a_cut_transfer_goes_on_where_it_was(world):
    target = Cut()
    with pytest.raises(Unavailable):
        copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert not target.exists(key_of(world.second))
    assert len(keys(target)) == 3
    target.left = 1000
    report = copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert report.blobs_there == 3
    assert check_there(target, world.second) == report.bytes_sent + report.bytes_there


def test_what_a_sweep_took_meanwhile_is_sent_again(world):
    class Swept(MemoryBlobs):
        """Loses everything directly before the last manifest arrives, as a collector with a short grace would."""

        taken = False

        def touch(self, key):
            if not self.taken and len(keys(self)) == len(closure(world.blobs, world.second)) - 1:
                self.taken = True
                for other in [k for k in keys(self) if k.startswith("layers/")]:
                    self.delete(other)
            return super().touch(key)

    target = Swept()
    copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert target.taken
    check_there(target, world.second)


@pytest.mark.parametrize("folder", ["layers/", "pagemaps/", "vmstates/", "manifests/"])
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_damaged_source_is_found_and_nothing_is_committed(world, folder, where):
    source, target = MemoryBlobs(), MemoryBlobs()
    for info in world.blobs.list_blobs():
        data = bytearray(world.blobs.get(info.key, max_bytes=1 << 30))
        if info.key.startswith(folder):
            data[int(where * (len(data) - 1))] ^= 1
        source.put(info.key, data)
    with pytest.raises(Corrupt) as caught:
        copy_snapshot(source, target, world.second, tell=quiet)
    assert caught.value.details["blob"]
    assert not target.exists(key_of(world.second))


def test_another_blob_of_that_name_at_the_other_end(world):
    target = MemoryBlobs()
    layer = next(i for i in closure(world.blobs, world.second) if i.key.startswith("layers/"))
    target.put(layer.key, b"short")
    with pytest.raises(Corrupt, match="5 bytes, not"):
        copy_snapshot(world.blobs, target, world.second, tell=quiet)


def test_what_is_not_there(world):
    with pytest.raises(NotFound):
        copy_snapshot(world.blobs, MemoryBlobs(), "snp_" + "0" * 64, tell=quiet)


def check(key, data, *, pieces=None, read=None):
    def ranged(offset, length):
        if offset + length > len(data):
            raise Corrupt("short")
        return data[offset : offset + length]

    return b"".join(checked_pieces(key, len(data), read or ranged, iter([data] if pieces is None else pieces)))


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_pieces_pass_unchanged(world, step):
    for item in closure(world.blobs, world.second):
        data = world.blobs.get(item.key, max_bytes=1 << 30)
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        assert check(item.key, data, pieces=pieces) == data
        assert b"".join(read_pieces(world.blobs, item.key, len(data), piece_bytes=step)) == data


def test_what_streams_must_be_what_was_looked_up(world):
    """The index is read by range and the content streams: a store that gives two answers is found out."""
    for item in closure(world.blobs, world.second):
        data = world.blobs.get(item.key, max_bytes=1 << 30)
        for bad in (data[:-1], data + b"x", data[:-1] + bytes([data[-1] ^ 1]), b""):
            with pytest.raises(Corrupt):
                check(item.key, data, pieces=[bad])


def test_a_key_that_is_no_hash(world):
    with pytest.raises(BadInput):
        check("refs/x/y", b"data")
