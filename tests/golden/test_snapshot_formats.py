"""Version 1 of layer, page map and manifest: stored bytes stay readable, and today's writer still speaks the same.

The files were written once (`python -m tests.golden.test_snapshot_formats`, which refuses to write over them) and are
never made again: a format that changes gets a new version, its own reader, its own files. Compressed bytes may
differ between versions of zstd, so what the writer makes today is compared uncompressed.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from recess.blobs import MemoryBlobs
from recess.frames import SeekableReader, WorkPool
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.forms import open_layer
from recess.snapshots.layer_v1 import LayerReader
from recess.snapshots.manifest_v1 import decode_manifest, encode_manifest
from recess.snapshots.pack_v1 import read_pack
from recess.snapshots.pagemap import KIND_BLOCKS, KIND_LAYER, Source
from recess.snapshots.pagemap_v1 import decode_tree, encode_tree
from tests.unit.snapshots.helpers import ArrayTemplate, FileSource, page, raw

HERE = Path(__file__).parent
FILES = {
    "layers": "layer_v1.zst",
    "pagemaps": "pagemap_v1.zst",
    "vmstates": "layer_v1_vmstate.zst",
    "manifests": "manifest_v1.json",
}
SNAPSHOT = "snp_5099434045246f6ff7fe75c830cefea836539ed2e6cf14db278d8119e59f12e4"

MEMORY = {0: 1, 1: 0, 2: 2, 3: 3, 4: 3, 511: 100, 512: 101, 515: 4, 699: 5}
DISK = {7: 2, 8: 6}
VMSTATE = b"device state " * 40
SOURCE = FileSource([page(n) for n in (99, 100, 101)])
META = SnapshotMeta(
    fingerprint={"driver": "qemu", "driver_version": "7.2.9", "cpu_flags": ["sse2", "ssse3"]}, spec={"memory_bytes": 700 * 4096},
    log_position=12, epoch=3, session="ses_1", machine="mch_1", why="idle", origin={"forked_from": "mch_0"}, created=1_700_000_000.25,
)  # fmt: skip


def template():
    booted = np.zeros((700, 4096), np.uint8)
    booted[1] = page(50)
    return ArrayTemplate("snp_" + "11" * 32, {"memory": booted, "disk0": np.zeros((10, 4096), np.uint8)})


def write(blobs):
    store = Store(blobs, frame_bytes=2 * 4096)
    parts = [raw("memory", 700, MEMORY), raw("disk0", 10, DISK)]
    ref = store.write(parts, VMSTATE, META, template=template(), sources=[SOURCE]).snapshot_id
    store.close()
    return ref


@pytest.fixture(scope="module")
def pool():
    pool = WorkPool()
    yield pool
    pool.close()


def stored_files():
    """A store that holds the stored files, under the keys that the stored manifest gives them."""
    data = {folder: (HERE / name).read_bytes() for folder, name in FILES.items()}
    manifest = decode_manifest(SNAPSHOT, data["manifests"])
    blobs = MemoryBlobs()
    blobs.put(f"manifests/{SNAPSHOT}", data["manifests"])
    blobs.put(f"layers/{manifest.layers[0].id}", data["layers"])
    blobs.put(f"pagemaps/{manifest.pagemaps[0].id}", data["pagemaps"])
    blobs.put(f"vmstates/{manifest.vmstate.id}", data["vmstates"])
    return blobs, manifest


@pytest.fixture(scope="module")
def golden():
    return stored_files()


def test_the_stored_snapshot_is_read(golden):
    blobs, _ = golden
    store = Store(blobs)
    for name, content in (("memory", MEMORY), ("disk0", DISK)):
        overlay = store.overlay(SNAPSHOT, name, template=template(), sources=[SOURCE])
        assert overlay.indices.tolist() == sorted(content)
        assert np.array_equal(overlay.data, np.stack([page(content[n]) for n in sorted(content)]))
    assert store.vmstate(SNAPSHOT) == VMSTATE
    store.close()


def seekable(golden, kind, file, folder):
    blobs, _ = golden
    key = f"{folder}/{file.id}"
    return SeekableReader(lambda at, n: blobs.get_range(key, at, n), file.bytes, file.id[4:], kind, "golden")


def test_todays_manifest_is_the_same(golden):
    blobs, manifest = golden
    assert encode_manifest(manifest) == (SNAPSHOT, blobs.get(f"manifests/{SNAPSHOT}", max_bytes=1 << 20))


def test_todays_page_map_is_the_same(golden, pool):
    _, manifest = golden
    stored = read_pack(seekable(golden, b"PMAP", manifest.pagemaps[0], "pagemaps"), pool)
    again = {}
    for part in manifest.parts.values():
        root = bytes.fromhex(part.root)
        found = decode_tree(root, stored.__getitem__, pages_total=part.pages, count=part.listed)
        assert encode_tree(found)[0] == root
        again |= encode_tree(found)[1]
    assert again == stored
    part = manifest.parts["memory"]
    found = decode_tree(bytes.fromhex(part.root), stored.__getitem__, pages_total=part.pages, count=part.listed)
    assert found.sources == (
        Source(KIND_BLOCKS, bytes.fromhex(SOURCE.source_hash)),
        Source(KIND_LAYER, bytes.fromhex(manifest.layers[0].id[4:])),
    )


def test_the_first_indexes_are_read(golden):
    _, manifest = golden
    for kind, file, folder in (
        (b"LAYR", manifest.layers[0], "layers"),
        (b"PMAP", manifest.pagemaps[0], "pagemaps"),
        (b"VMST", manifest.vmstate, "vmstates"),
    ):
        reader = seekable(golden, kind, file, folder)  # its hash is checked
        assert reader.table.contents is None  # version 1 proves no content: such a file is never recompressed


def test_todays_writer_makes_the_same_content(golden, pool):
    old_blobs, old = golden
    blobs = MemoryBlobs()
    new = decode_manifest(ref := write(blobs), blobs.get(f"manifests/{ref}", max_bytes=1 << 20))
    assert {n: (p.pages, p.zero, p.block, p.layer) for n, p in new.parts.items()} == {
        n: (p.pages, p.zero, p.block, p.layer) for n, p in old.parts.items()
    }
    readers = []
    for store, manifest in ((old_blobs, old), (blobs, new)):
        readers.append(LayerReader(open_layer(store, manifest.layers[0].id, manifest.layers[0].bytes)))
    owners = [[(name, pages.tolist()) for name, pages in reader.owners()] for reader in readers]
    assert owners[0] == owners[1] == [("memory", [0, 2, 3, 515, 699]), ("disk0", [8])]


def test_the_zstd_program_unpacks_the_stored_layer():
    tool = shutil.which("zstd")
    if tool is None:
        pytest.skip("the zstd program is not installed")
    found = subprocess.run([tool, "-dc", HERE / FILES["layers"]], capture_output=True, check=True).stdout
    assert found == b"".join(page(n).tobytes() for n in (1, 2, 3, 4, 5, 6))


if __name__ == "__main__":
    made = MemoryBlobs()
    print(write(made))
    for info in made.list_blobs():
        with (HERE / FILES[info.key.partition("/")[0]]).open("xb") as file:
            file.write(made.get(info.key, max_bytes=1 << 20))
