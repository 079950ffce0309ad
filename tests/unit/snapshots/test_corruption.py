"""Every flipped bit and every truncation of any blob is noticed or does not matter; it is never believed."""

import pytest

from recess.errors import Corrupt
from recess.snapshots import SnapshotMeta, Store
from tests.unit.snapshots.helpers import Blobs, FileSource, damage_each, page, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
SOURCE = FileSource([page(100)])


@pytest.fixture(scope="module")
def stored():
    """A child that refers to two layers and two packs, its id, and what it reads as."""
    blobs = Blobs()
    store = Store(blobs, frame_bytes=2 * 4096)
    memory = {n: n + 1 for n in range(6)} | {600: 100, 601: 0, 1024: 9}
    one = store.write([raw("memory", 2000, memory), raw("disk0", 9, {3: 4})], b"a", META, sources=[SOURCE])
    memory = memory | {3: 33, 1024: 44}
    two = store.write(
        [raw("memory", 2000, memory), raw("disk0", 9, {3: 4})], b"vm", META, parent_id=one.snapshot_id, sources=[SOURCE]
    )
    manifest = store.manifest(two.snapshot_id)
    assert (len(manifest["layers"]), len(manifest["pagemaps"])) == (2, 2)
    yield blobs, store, two.snapshot_id
    store.close()


def read_all(store, ref):
    return (
        read(store, ref, "memory", template=None, sources=[SOURCE]),
        read(store, ref, "disk0", template=None, sources=[SOURCE]),
        store.vmstate(ref),
    )


def outcome(store, ref):
    try:
        return read_all(store, ref)
    except Corrupt:
        return "corrupt"


@pytest.mark.parametrize("folder", ["manifests", "layers", "pagemaps", "vmstates"])
def test_damage(stored, folder):
    blobs, store, ref = stored
    expected = read_all(store, ref)
    manifest = store.manifest(ref)
    used = {ref, manifest["vmstate"]["id"], *(file["id"] for kind in ("layers", "pagemaps") for file in manifest[kind])}
    for key in [info.key for info in blobs.list_blobs(f"{folder}/") if info.key.rpartition("/")[2] in used]:
        good = blobs.get(key, max_bytes=1 << 30)
        for what, bad in damage_each(good, every=max(1, len(good) // 150)):
            blobs.replace(key, bad)
            with pytest.raises(Corrupt):
                store.verify(ref)
            assert outcome(store, ref) in (expected, "corrupt"), f"{key}: {what} was believed"
        blobs.replace(key, good)
    assert read_all(store, ref) == expected


def test_a_missing_file_is_named(stored):
    from recess.errors import NotFound

    blobs, store, ref = stored
    for info in list(blobs.list_blobs("layers/")):
        good = blobs.get(info.key, max_bytes=1 << 30)
        blobs.delete(info.key)
        with pytest.raises(NotFound) as caught:
            store.verify(ref)
        assert caught.value.details["ref"] == info.key
        blobs.put(info.key, good)


def test_the_stored_file_of_another_size_is_not_relied_on(stored):
    blobs, store, ref = stored
    vmstate = store.vmstate(ref)
    good = {info.key: blobs.get(info.key, max_bytes=1 << 30) for info in blobs.list_blobs("vmstates/")}
    for key in good:
        blobs.replace(key, b"short")
    with pytest.raises(Corrupt):
        store.write([raw("memory", 9, {})], vmstate, META)
    for key, data in good.items():
        blobs.replace(key, data)
