"""Image files that travel: whole, checked, and never in the way of the node's own."""

import os
import shutil
import subprocess

import pytest
from blake3 import blake3

from recess.errors import Corrupt, NotFound
from recess.images.portable import KERNEL, ROOT, find_file, install, packed, unpacked

CONTENT = os.urandom(100_000) + bytes(5 << 20) + b"the end"
DIGEST = blake3(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_there_and_back(file, tmp_path):
    pieces = list(packed(file))
    assert len(pieces) == 2
    whole = b"".join(pieces)
    for step in (1000, 1 << 20, len(whole)):
        cut = (whole[i : i + step] for i in range(0, len(whole), step))
        assert b"".join(unpacked(cut, DIGEST)) == CONTENT
    zstd = shutil.which("zstd")
    if zstd is not None:
        (tmp_path / "x.zst").write_bytes(whole)
        subprocess.run([zstd, "-q", "-d", tmp_path / "x.zst"], check=True)
        assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", [ROOT, KERNEL])
def test_a_file_is_put_in_its_place_once(file, tmp_path, kind):
    images = tmp_path / "images"
    images.mkdir()
    assert find_file(images, kind, DIGEST) is None
    path = install(images, kind, DIGEST, lambda: packed(file))
    assert path.read_bytes() == CONTENT
    assert find_file(images, kind, DIGEST) == path

    def never():
        raise AssertionError("it is there")

    assert install(images, kind, DIGEST, never) == path


def test_a_kernel_of_this_node_serves_and_a_strangers_is_kept_apart(file, tmp_path):
    own = tmp_path / "images" / "kernel" / DIGEST
    own.mkdir(parents=True)
    (own / "vmlinux").write_bytes(CONTENT)
    assert find_file(tmp_path / "images", KERNEL, DIGEST) == own / "vmlinux"
    assert find_file(tmp_path / "images", ROOT, DIGEST) is None
    other = tmp_path / "other"
    other.mkdir()
    install(other, KERNEL, DIGEST, lambda: packed(file))
    assert not (other / "kernel").exists()


def damaged(pieces, how):
    whole = bytearray(b"".join(pieces))
    if how == "flipped":
        whole[50_000] ^= 1
    elif how == "cut":
        del whole[-10:]
    elif how == "cut at a frame":
        whole = bytearray(pieces[0])
    elif how == "more":
        whole += pieces[-1]
    elif how == "rubbish after":
        whole += b"rubbish"
    return bytes(whole)


@pytest.mark.parametrize("how", ["flipped", "cut", "cut at a frame", "more", "rubbish after"])
def test_what_is_not_what_its_name_says_is_not_kept(file, tmp_path, how):
    images = tmp_path / "images"
    images.mkdir()
    bad = damaged(list(packed(file)), how)
    with pytest.raises(Corrupt):
        install(images, ROOT, DIGEST, lambda: iter([bad]))
    assert find_file(images, ROOT, DIGEST) is None
    assert [p for p in images.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("digest", ["", "../../etc", "A" * 64, "0" * 63])
def test_what_is_no_hash(tmp_path, digest):
    assert find_file(tmp_path, ROOT, digest) is None
    with pytest.raises(NotFound):
        install(tmp_path, ROOT, digest, lambda: iter([]))
