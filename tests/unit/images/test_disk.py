import os
import subprocess

import pytest

from recess.errors import BadInput
from recess.images import disk
from recess.images.tools import find_tool
from recess.units import GIB, MIB


def test_a_blank_disk_is_a_clean_filesystem_of_few_blocks(tmp_path):
    blank = disk.ensure_blank_disk(tmp_path, 4 * GIB)
    assert blank.path.stat().st_size == 4 * GIB
    assert blank.allocated_bytes <= 256 * 1024
    subprocess.run([find_tool("e2fsck"), "-fn", blank.path], check=True, capture_output=True)
    shown = subprocess.run([find_tool("dumpe2fs"), blank.path], check=True, capture_output=True, text=True).stdout
    assert "has_journal" in shown
    groups = [line for line in shown.splitlines() if line.startswith("Group ") and "(Blocks" in line]
    assert groups
    assert all("ITABLE_ZEROED" in line for line in groups), "a guest would initialise these tables itself"


def test_the_same_size_gives_the_same_bytes_everywhere(tmp_path):
    one = disk.ensure_blank_disk(tmp_path / "1", 64 * MIB)
    two = disk.ensure_blank_disk(tmp_path / "2", 64 * MIB)
    assert one.path.read_bytes() == two.path.read_bytes()


def test_it_is_made_once(tmp_path):
    first = disk.ensure_blank_disk(tmp_path, 32 * MIB)
    inode = first.path.stat().st_ino
    assert disk.ensure_blank_disk(tmp_path, 32 * MIB).path.stat().st_ino == inode
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("size", [0, -4096, 4097, 8 * MIB, 8192 * GIB])
def test_a_size_that_cannot_be_is_refused(tmp_path, size):
    with pytest.raises(BadInput):
        disk.ensure_blank_disk(tmp_path, size)
    assert not (tmp_path / "disks").exists()


def test_a_clone_is_equal_and_as_sparse(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    with source.open("wb") as handle:
        for offset in (0, 5 * MIB, 40 * MIB + 4096):
            os.pwrite(handle.fileno(), os.urandom(8192), offset)
        handle.truncate(64 * MIB)
    disk.clone_sparse(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks


def test_a_clone_of_a_hole_is_a_hole(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    with source.open("wb") as handle:
        handle.truncate(MIB)
    disk.clone_sparse(source, target)
    assert (target.stat().st_size, target.stat().st_blocks) == (MIB, 0)


def test_a_clone_across_filesystems(tmp_path):
    shared = "/dev/shm"
    source = tmp_path / "s"
    source.write_bytes(os.urandom(3 * MIB))
    target = os.path.join(shared, f"recess-clone-{os.getpid()}")
    try:
        disk.clone_sparse(source, disk.Path(target))
        with open(target, "rb") as handle:
            assert handle.read() == source.read_bytes()
    finally:
        os.unlink(target)


def test_a_clone_never_overwrites(tmp_path):
    (tmp_path / "s").write_bytes(b"new")
    (tmp_path / "t").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        disk.clone_sparse(tmp_path / "s", tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == b"old"
