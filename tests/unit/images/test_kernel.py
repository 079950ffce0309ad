import bz2
import lzma
import random
import struct
import zlib

import pytest

from recess.errors import Corrupt
from recess.images import kernel


def elf(*, pvh: bool = True, filler: int = 5000) -> bytes:
    """A minimal 64-bit ELF with one note segment."""
    kind = 18 if pvh else 1
    note = struct.pack("<III", 4, 8, kind) + b"Xen\0" + bytes(8)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return head + program + note + b"k" * filler


def boot_image(payload: bytes) -> bytes:
    """A bzImage whose setup part has one sector and whose payload starts right after it."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 0, len(payload))
    return bytes(setup) + payload


def lz4_stored(data: bytes) -> bytes:
    """lz4's legacy frame with one block of literals only."""
    left, lengths = len(data) - 15, b""
    while left >= 255:
        lengths += b"\xff"
        left -= 255
    block = b"\xf0" + lengths + bytes([left]) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block + struct.pack("<I", len(data))


@pytest.mark.parametrize(
    "pack",
    [
        lz4_stored,
        lambda d: lzma.compress(d) + struct.pack("<I", len(d)),
        lambda d: lzma.compress(d, format=lzma.FORMAT_ALONE) + struct.pack("<I", len(d)),
        lambda d: zlib.compress(d, wbits=31) + struct.pack("<I", len(d)),
        lambda d: kernel.zstd.compress(d) + struct.pack("<I", len(d)),
        lambda d: bz2.compress(d) + struct.pack("<I", len(d)),
        lambda d: d,
    ],
    ids=["lz4", "xz", "lzma", "gzip", "zstd", "bzip2", "stored"],
)
def test_every_compression_is_unpacked(pack):
    assert kernel.extract_vmlinux(boot_image(pack(elf()))) == elf()


@pytest.mark.parametrize(
    "pack",
    [lzma.compress, lambda d: zlib.compress(d, wbits=31), kernel.zstd.compress, bz2.compress],
    ids=["xz", "gzip", "zstd", "bzip2"],
)
def test_a_packed_kernel_that_is_cut_short_is_none(pack):
    noise = random.Random(7).randbytes(1 << 20)  # so that what is unpacked of the cut one holds the note
    packed = pack(elf(filler=0) + noise)
    assert kernel.extract_vmlinux(packed).endswith(noise)
    with pytest.raises(Corrupt, match="cut short"):
        kernel.extract_vmlinux(packed[: len(packed) * 3 // 4])


def test_a_damaged_lz4_block_is_no_kernel():
    packed = lz4_stored(elf())
    block = packed[8:-4]
    damaged = packed[:4] + struct.pack("<I", len(block)) + block + struct.pack("<I", 9) + b"\xf0" + b"\xff" * 8
    with pytest.raises(Corrupt, match="lz4"):
        kernel.extract_vmlinux(damaged)


def test_an_elf_is_taken_as_it_is():
    assert kernel.extract_vmlinux(elf()) == elf()


def test_a_packed_elf_as_a_release_publishes_it():
    assert kernel.extract_vmlinux(kernel.zstd.compress(elf())) == elf()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "not a Linux boot image"),
        (bytes(4096), "not a Linux boot image"),
        (boot_image(b"neither packed nor ELF"), "does not hold an ELF"),
        (boot_image(elf(pvh=False)), "PVH"),
        (boot_image(lzma.compress(elf()))[:-40], "truncated"),
        (boot_image(lzma.compress(elf())[:60]), "cut short"),
    ],
)
def test_what_is_no_kernel_is_corrupt(image, says):
    with pytest.raises(Corrupt, match=says):
        kernel.extract_vmlinux(image)


def test_a_note_table_that_points_outside_is_no_pvh():
    damaged = bytearray(elf())
    struct.pack_into("<Q", damaged, 0x20, 1 << 40)
    assert not kernel.has_pvh_note(bytes(damaged))


def module(depends: str) -> bytes:
    return b"\x7fELF....\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def test_modules_are_loaded_after_what_they_need():
    modules = {"blk": module("virtio,ring"), "virtio": module("ring"), "ring": module(""), "erofs": module("crc")}
    assert kernel.load_order(modules, frozenset({"crc"}), ["blk", "erofs"]) == ["ring", "virtio", "blk", "erofs"]


def test_a_built_in_module_is_not_asked_for():
    assert kernel.load_order({}, frozenset({"ext4"}), ["ext4"]) == []


def test_a_missing_module_is_named():
    with pytest.raises(Corrupt, match="'ring'"):
        kernel.load_order({"virtio": module("ring")}, frozenset(), ["virtio"])


def test_modules_that_need_each_other_are_corrupt():
    with pytest.raises(Corrupt, match="no usable module"):
        kernel.load_order({"a": module("b"), "b": module("a")}, frozenset(), ["a"])


def test_module_names_and_packed_modules():
    assert kernel.module_name("kernel/crypto/crc32c-intel.ko.xz") == "crc32c_intel"
    assert kernel.module_bytes("x/a.ko.xz", lzma.compress(b"elf")) == b"elf"
    assert kernel.module_bytes("x/a.ko", b"elf") == b"elf"
    assert kernel.module_depends(b"depends=one,two-three\0") == ["one", "two_three"]
    assert kernel.module_depends(b"no such thing") == []
