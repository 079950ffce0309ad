"""A full disk while a snapshot is written: a typed error, the space given back, older snapshots untouched."""

import os

import pytest

from recess.blobs import LocalBlobs, MemoryBlobs
from recess.errors import OutOfSpace
from recess.snapshots import SnapshotMeta, Store
from recess.testing.small_disk import small_disk
from tests.unit.snapshots.helpers import page, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
SMALL = {n: n + 1 for n in range(10)}
LARGE = {n: n + 1 for n in range(900)}


def content(numbers):
    return {n: page(v).tobytes() for n, v in numbers.items()}


@pytest.mark.parametrize("spare", [0, 300, 1000, 2_000, 1_700_000])
def test_memory_that_is_full(spare):
    """`spare` bytes are left: none of the files fits, some do, all but the manifest do."""
    blobs = MemoryBlobs()
    store = Store(blobs)
    old = store.write([raw("memory", 1000, SMALL)], b"old", META).snapshot_id
    before = {info.key: info.size_bytes for info in blobs.list_blobs()}
    blobs.capacity_bytes = sum(before.values()) + spare
    with pytest.raises(OutOfSpace):
        store.write([raw("memory", 1000, LARGE)], os.urandom(5000), META, parent_id=old)
    assert {info.key: info.size_bytes for info in blobs.list_blobs()} == before
    assert read(store, old, "memory", template=None) == content(SMALL)
    blobs.capacity_bytes = None
    new = store.write([raw("memory", 1000, LARGE)], b"new", META, parent_id=old).snapshot_id
    assert read(store, new, "memory", template=None) == content(LARGE)
    store.close()


def test_only_the_manifest_does_not_fit():
    blobs = MemoryBlobs()
    store = Store(blobs)
    report = store.write([raw("memory", 1000, SMALL)], b"old", META)
    size = blobs.stat(f"manifests/{report.snapshot_id}").size_bytes
    blobs = MemoryBlobs(capacity_bytes=report.new_bytes - size)
    store.close()
    store = Store(blobs)
    with pytest.raises(OutOfSpace):
        store.write([raw("memory", 1000, SMALL)], b"old", META)
    assert list(blobs.list_blobs()) == []
    store.close()


@pytest.fixture
def tiny(tmp_path):
    """A real file system of 1 MiB."""
    with small_disk(tmp_path / "tiny", 1 << 20) as root:
        yield root


@pytest.mark.mounts
def test_a_real_disk_that_is_full(tiny, tmp_path):
    store = Store(LocalBlobs(tiny / "blobs"))
    old = store.write([raw("memory", 1000, SMALL)], b"old", META).snapshot_id
    before = sorted(str(path) for path in (tiny / "blobs").rglob("*") if path.is_file())
    with pytest.raises(OutOfSpace) as caught:
        store.write([raw("memory", 1000, LARGE)], b"new", META, parent_id=old)
    assert caught.value.hint
    assert sorted(str(path) for path in (tiny / "blobs").rglob("*") if path.is_file()) == before
    assert read(store, old, "memory", template=None) == content(SMALL)
    big = Store(LocalBlobs(tmp_path / "elsewhere"))
    ref = big.write([raw("memory", 1000, LARGE)], b"new", META).snapshot_id
    with pytest.raises(OutOfSpace):
        big.materialise(ref, "memory", tiny / "ram")
    assert not list(tiny.glob("*ram*"))
    big.close()
    store.close()
