"""A snapshot in a bucket, behind a real S3 server: of a large one only what is needed travels, in few requests."""

import secrets

import numpy as np
import pytest

from recess.blobs import CachingBlobs, LocalBlobs, MeteredBlobs
from recess.blobs.s3 import open_bucket
from recess.errors import Unavailable
from recess.node.pagereader import SnapshotPages
from recess.snapshots import RawPart, SnapshotMeta
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.keys import is_layer_key
from recess.snapshots.shared import SharedStore
from recess.testing.blob_server import s3_server
from recess.units import MIB

META = SnapshotMeta(fingerprint={}, spec={})
MEMORY, DISK = 2048, 40  # pages: 8 MiB of noise, and a disk that hardly changed
FRAME = 16  # pages


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


class Home:
    """One home over a bucket, and what came from there to it."""

    def __init__(self, remote, folder, name):
        self.meter = MeteredBlobs(remote)
        self.cache = CachingBlobs(
            self.meter, LocalBlobs(folder), checked_pieces, max_bytes=1 << 30, whole_max_bytes=1 << 30
        )  # fmt: skip
        self.store = SharedStore(self.cache, name * 16, cache=self.cache)

    def copied_layers(self):
        return [info.key for info in self.cache._local.list_blobs() if is_layer_key(info.key)]


@pytest.fixture
def bucket(server):
    return open_bucket(server.make_bucket(f"f-{secrets.token_hex(6)}"), server.settings)


@pytest.fixture
def made(bucket, tmp_path):
    """A snapshot of two layers that one home has written: its id, memory and disk."""
    rng = np.random.default_rng(5)
    memory = rng.integers(0, 256, (MEMORY, 4096), np.uint8)
    disk = rng.integers(0, 256, (DISK, 4096), np.uint8)
    home = Home(bucket, tmp_path / "writer", "a")

    def write(lowest, parent):
        parts = [
            RawPart("memory", 1 << 16, np.arange(lowest, MEMORY, dtype=np.uint32), memory[lowest:]),
            RawPart("disk0", 1 << 16, np.arange(DISK, dtype=np.uint32) * 100, disk),
        ]
        return home.store.write(parts, b"state", META, parent_id=parent).snapshot_id

    ref = write(0, write(MEMORY // 2, ""))
    assert len(home.store.manifest(ref)["layers"]) == 2
    home.store.close()
    return ref, memory, disk


@pytest.fixture
def home(bucket, tmp_path):
    other = Home(bucket, tmp_path / "reader", "b")
    yield other
    other.store.close()


def test_the_disk_of_a_large_machine_comes_alone(made, home):
    ref, _, disk = made
    before = home.meter.traffic
    overlay = home.store.overlay(ref, "disk0", template=None, sparing=True)
    np.testing.assert_array_equal(overlay.data, disk)
    came = home.meter.traffic - before
    assert came.read_bytes < 1 * MIB  # of 8: the disk's frames, the ends of two layers, the map
    assert home.copied_layers() == []
    # once more: the map has a copy by now, the frames come again
    before = home.meter.traffic
    home.store.overlay(ref, "disk0", template=None, sparing=True)
    assert (home.meter.traffic - before).read_bytes < came.read_bytes


def test_what_is_read_whole_is_copied_and_then_read_here(made, home):
    ref, memory, disk = made
    np.testing.assert_array_equal(home.store.overlay(ref, "memory", template=None).data, memory)
    assert len(home.copied_layers()) == 2
    before = home.meter.traffic
    np.testing.assert_array_equal(home.store.overlay(ref, "disk0", template=None, sparing=True).data, disk)
    assert (home.meter.traffic - before).read_bytes == 0


def test_a_copy_that_is_damaged_is_dropped_and_read_anew(made, home, tmp_path):
    ref, _, disk = made
    home.store.overlay(ref, "memory", template=None)
    for key in home.copied_layers():
        path = tmp_path / "reader" / key
        path.chmod(0o600)
        path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(home.store.overlay(ref, "disk0", template=None, sparing=True).data, disk)


def library(blobs, ref, tmp_path, far):
    template = tmp_path / "ram"
    with template.open("wb") as file:
        file.truncate(4096 << 16)
    return SnapshotPages(blobs, ref, "memory", template, {}, far=far)


@pytest.mark.parametrize("far", [False, True])
def test_a_working_set_that_lies_together_comes_by_one_request(made, bucket, tmp_path, far):
    ref, memory, _ = made
    meter = MeteredBlobs(bucket)
    pages = library(meter, ref, tmp_path, far)
    wanted = [pages.book.group_of(page) for page in range(MEMORY // 2, MEMORY // 2 + 60 * FRAME, FRAME)]
    before = meter.traffic
    pages.prefetch(wanted)
    came = meter.traffic - before
    assert came.read_calls == (1 if far else 8)
    between = meter.traffic
    for group in wanted:
        for piece in pages.fetch(group)[0]:
            np.testing.assert_array_equal(piece.data, memory[piece.first : piece.first + len(piece.data)])
    assert meter.traffic == between
    assert sum(pages.fetch(group)[1] for group in wanted[:1]) > 0


def test_what_could_not_be_read_ahead_is_read_when_it_is_touched(made, bucket, tmp_path, monkeypatch):
    ref, memory, _ = made
    pages = library(bucket, ref, tmp_path, True)
    group = pages.book.group_of(MEMORY - 1)

    def unavailable(tasks):
        raise Unavailable("the store is down")

    with monkeypatch.context() as patched:
        patched.setattr(pages._pool, "each", unavailable)
        with pytest.raises(Unavailable):
            pages.prefetch([group])
    (piece, *_), _ = pages.fetch(group)
    np.testing.assert_array_equal(piece.data, memory[piece.first : piece.first + len(piece.data)])


def test_scattered_pages_come_side_by_side(made, bucket, tmp_path):
    ref, _, _ = made
    meter = MeteredBlobs(bucket)
    pages = library(meter, ref, tmp_path, True)
    wanted = [pages.book.group_of(page) for page in range(0, MEMORY, 8 * FRAME)]
    before = meter.traffic
    pages.prefetch(wanted)
    assert (meter.traffic - before).read_calls == 2  # one a layer, of many ranges
