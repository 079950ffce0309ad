"""Image files that go along: packed into a store, put in place from one, or said to be missing."""

from __future__ import annotations

import os

import pytest
from blake3 import blake3

from recess.blobs import MemoryBlobs
from recess.errors import Corrupt, NotFound
from recess.images.portable import KERNEL, ROOT, find_file, install, packed
from recess.machines.imagefiles import StoredImages
from recess.node.travelfiles import TravelFiles, check_file
from recess.snapshots.keys import file_key

ROOT_BYTES, KERNEL_BYTES = os.urandom(200_000), os.urandom(9_000)
DIGESTS = {ROOT: blake3(ROOT_BYTES).hexdigest(), KERNEL: blake3(KERNEL_BYTES).hexdigest()}
MANIFEST = {"spec": {"vm": {"root": DIGESTS[ROOT], "kernel": DIGESTS[KERNEL], "initrd": "0" * 64}}}


def node(folder):
    folder.mkdir()
    lines = []
    return TravelFiles(folder, StoredImages(folder, folder / "guestd", lines.append), lines.append)


@pytest.fixture
def have(tmp_path):
    """A node that has both."""
    files = node(tmp_path / "have")
    for kind, content in ((ROOT, ROOT_BYTES), (KERNEL, KERNEL_BYTES)):
        (tmp_path / kind).write_bytes(content)
        install(tmp_path / "have", kind, DIGESTS[kind], lambda kind=kind: packed(tmp_path / kind))
    return files


async def test_from_a_node_that_has_to_one_that_has_not(have, tmp_path):
    lacks = node(tmp_path / "lacks")
    assert await have.missing(MANIFEST) == ""
    assert "no root image" in await lacks.missing(MANIFEST)
    store = MemoryBlobs()
    assert have.pack(MANIFEST, store) == sorted(DIGESTS.values())
    before = [store.stat(file_key(d)).size_bytes for d in DIGESTS.values()]
    have.pack(MANIFEST, store)
    assert [store.stat(file_key(d)).size_bytes for d in DIGESTS.values()] == before
    lacks.unpack(MANIFEST, store)
    assert await lacks.missing(MANIFEST) == ""
    root = find_file(tmp_path / "lacks", ROOT, DIGESTS[ROOT])
    assert root is not None
    assert root.read_bytes() == ROOT_BYTES
    assert lacks.pack(MANIFEST, MemoryBlobs()) == sorted(DIGESTS.values())


async def test_what_a_store_does_not_hold_stays_missing(have, tmp_path):
    lacks = node(tmp_path / "lacks")
    lacks.unpack(MANIFEST, MemoryBlobs())
    assert await lacks.missing(MANIFEST)
    with pytest.raises(NotFound):
        lacks.pack(MANIFEST, MemoryBlobs())


def test_a_damaged_traveller_is_not_put_in_place(have, tmp_path):
    lacks, store = node(tmp_path / "lacks"), MemoryBlobs()
    have.pack(MANIFEST, store)
    key = file_key(DIGESTS[ROOT])
    bad = bytearray(store.get(key, max_bytes=1 << 30))
    bad[1000] ^= 1
    store.delete(key)
    store.put(key, bad)
    with pytest.raises(Corrupt):
        lacks.unpack(MANIFEST, store)
    assert find_file(tmp_path / "lacks", ROOT, DIGESTS[ROOT]) is None
    with pytest.raises(Corrupt):
        check_file(iter([bytes(bad)]), DIGESTS[ROOT])


@pytest.mark.parametrize("manifest", [{}, {"spec": {}}, {"spec": {"vm": "x"}}])
def test_a_manifest_without_a_machine(have, manifest):
    with pytest.raises(Corrupt):
        have.needed(manifest)


def test_a_manifest_with_strange_hashes_reads_nothing_of_ours(have):
    strange = {"spec": {"vm": {"root": "../../../etc", "kernel": "x", "initrd": ""}}}
    with pytest.raises(NotFound):
        have.pack(strange, MemoryBlobs())
    have.unpack(strange, MemoryBlobs())


async def test_an_initial_root_is_a_hash_and_never_a_path(have):
    strange = {"spec": {"vm": MANIFEST["spec"]["vm"] | {"initrd": "../../../../tmp"}}}
    assert "not the hash" in await have.missing(strange)
