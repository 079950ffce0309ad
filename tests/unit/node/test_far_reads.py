"""A snapshot in a bucket, behind a real S3 server: of a large one only what is needed travels, in few requests."""

import secrets
import threading

import numpy as np
import pytest

from recess.blobs import CachingBlobs, LocalBlobs, MeteredBlobs
from recess.blobs.s3 import open_bucket
from recess.errors import Unavailable
from recess.node.pagereader import SnapshotPages
from recess.snapshots import RawPart, SnapshotMeta
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.keys import is_layer_key
from recess.snapshots.layer_v1 import LayerReader
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


@pytest.fixture
def library(made, tmp_path):
    """What opens the snapshot's memory over a store; all of it is closed in the end."""
    template = tmp_path / "ram"
    with template.open("wb") as file:
        file.truncate(4096 << 16)
    opened = []

    def open_over(blobs, far=True):
        opened.append(SnapshotPages(blobs, made[0], "memory", template, {}, far=far))
        return opened[-1]

    yield open_over
    for one in opened:
        one.close()


def check(pages, group, memory):
    for piece in pages.fetch(group)[0]:
        np.testing.assert_array_equal(piece.data, memory[piece.first : piece.first + len(piece.data)])


@pytest.mark.parametrize("far", [False, True])
def test_a_working_set_that_lies_together_comes_by_one_request(made, bucket, library, far):
    _, memory, _ = made
    meter = MeteredBlobs(bucket)
    pages = library(meter, far)
    wanted = [pages.book.group_of(page) for page in range(MEMORY // 2, MEMORY // 2 + 60 * FRAME, FRAME)]
    before = meter.traffic
    pages.prefetch(wanted)
    for group in wanted:
        check(pages, group, memory)
    assert (meter.traffic - before).read_calls == (1 if far else 8)
    assert pages.fetch(wanted[0])[1] > 0


def test_a_page_that_nobody_expected_brings_what_lies_around_it(made, bucket, library):
    _, memory, _ = made
    meter = MeteredBlobs(bucket)
    pages = library(meter)
    before = meter.traffic
    groups = range(8)  # noise: two frames are 128 KiB
    for group in groups:
        check(pages, group, memory)
    came = meter.traffic - before
    assert came.read_calls <= len(groups) / 2 + 1
    assert came.read_bytes <= (len(groups) + 1) * 4096 * (FRAME + 1)


def test_what_could_not_be_read_ahead_is_read_when_it_is_touched(made, bucket, library, monkeypatch):
    _, memory, _ = made
    pages = library(bucket)

    def unavailable(layer, numbers):
        raise Unavailable("the store is down")

    monkeypatch.setattr(LayerReader, "frames", unavailable)
    group = pages.book.group_of(MEMORY - 1)
    pages.prefetch([group])
    check(pages, group, memory)
    monkeypatch.setattr(LayerReader, "frame", unavailable)
    with pytest.raises(Unavailable):
        pages.fetch(pages.book.group_of(0))


class Crowd(MeteredBlobs):
    """A store that answers only when so many ask at once, once there is somebody to wait for."""

    crowd = None

    def get_ranges(self, key, ranges):
        if self.crowd is not None:
            self.crowd.wait(30)
        return super().get_ranges(key, ranges)


def test_scattered_pages_come_side_by_side(made, bucket, library):
    _, memory, _ = made
    store = Crowd(bucket)
    pages = library(store)
    store.crowd = threading.Barrier(4)  # a request alone would wait for ever
    wanted = [pages.book.group_of(page) for page in range(0, MEMORY, 8 * FRAME)]
    before = store.traffic
    pages.prefetch(wanted)
    for group in wanted:
        check(pages, group, memory)
    assert (store.traffic - before).read_calls == len(wanted) == 16
