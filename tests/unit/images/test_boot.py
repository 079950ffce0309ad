import json

import pytest

from recess.errors import Corrupt, MissingTool
from recess.images import boot


@pytest.fixture
def home(tmp_path):
    """Images with a kernel in place, as `fetch_kernel` leaves it."""
    digest = "ab" * 32
    modules = tmp_path / "kernel" / digest / "modules"
    modules.mkdir(parents=True)
    (modules.parent / "vmlinux").write_bytes(b"\x7fELF")
    (modules / "00-virtio.ko").write_bytes(b"virtio")
    (modules / "01-virtio_blk.ko").write_bytes(b"blk")
    current = {"version": 1, "hash": digest, "package": "linux-image-6.1 6.1.1"}
    (tmp_path / "kernel" / "current.json").write_text(json.dumps(current))
    (tmp_path / "guestd").write_bytes(b"guestd one")
    return tmp_path


def test_boot_files_are_made_from_what_is_there(home):
    files = boot.ensure_boot_files(home, home / "guestd")
    assert files == boot.ensure_boot_files(home, home / "guestd")
    assert (files.kernel_hash, files.kernel_package) == ("ab" * 32, "linux-image-6.1 6.1.1")
    archive = files.initrd.read_bytes()
    assert b"guestd one" in archive
    assert b"/modules/00-virtio.ko\n/modules/01-virtio_blk.ko\n" in archive


def test_a_new_guestd_gives_a_new_initrd_beside_the_old(home):
    old = boot.ensure_boot_files(home, home / "guestd")
    (home / "guestd").write_bytes(b"guestd two")
    new = boot.ensure_boot_files(home, home / "guestd")
    assert new.initrd_hash != old.initrd_hash
    assert old.initrd.exists()
    assert new.initrd.exists()


def test_without_guestd_nothing_boots(tmp_path):
    with pytest.raises(MissingTool, match="guestd is not built"):
        boot.ensure_boot_files(tmp_path, tmp_path / "guestd")


@pytest.mark.parametrize("change", [{"hash": "../x"}, {"hash": "cd" * 32}, {"version": 2}])
def test_a_lost_kernel_is_corrupt(home, change):
    path = home / "kernel" / "current.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Corrupt):
        boot.ensure_boot_files(home, home / "guestd")
