"""Debian's kernel package taken apart; the real download is in tests/machines/test_images.py."""

import io
import lzma
import tarfile

import pytest

from recess.errors import Corrupt
from recess.images import kernel_debian


def package(*files: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


MODULES = "./lib/modules/6.1/kernel"


def test_a_kernel_package_is_read():
    tar = package(
        ("./boot/vmlinuz-6.1", b"image"),
        ("./lib/modules/6.1/modules.builtin", b"kernel/fs/ext4/ext4.ko\n"),
        (f"{MODULES}/drivers/virtio/virtio.ko", b"elf"),
        (f"{MODULES}/drivers/block/virtio_blk.ko.xz", lzma.compress(b"blk")),
        (f"{MODULES}/sound/snd.ko", b"never read"),
    )
    image, modules, built_in = kernel_debian.read_package(tar)
    assert (image, modules, built_in) == (b"image", {"virtio": b"elf", "virtio_blk": b"blk"}, frozenset({"ext4"}))


@pytest.mark.parametrize("tar", [b"", b"x" * 2000, package(("./boot/vmlinuz-6.1", b"image"))])
def test_what_is_no_kernel_package_is_corrupt(tar):
    with pytest.raises(Corrupt):
        kernel_debian.read_package(tar)
