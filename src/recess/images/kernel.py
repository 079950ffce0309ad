"""What is inside a distribution's kernel package: the boot image, the kernel proper in it, and the modules.

Pure functions over bytes; `boot.py` does the fetching and storing. Sources of the formats: Documentation/arch/x86/boot.rst
(bzImage), Xen's elfnote.h (the PVH entry note), lz4's legacy frame
(lz4_Frame_format.md), and the `.modinfo` strings that every module carries.
"""

from __future__ import annotations

import bz2
import ctypes
import ctypes.util
import lzma
import re
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from recess.errors import Corrupt, MissingTool

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAX_KERNEL_BYTES = 256 << 20
_LZ4_LEGACY_BLOCK_BYTES = 8 << 20
_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_ELF_MAGIC = b"\x7fELF"
_XEN_ELFNOTE_PHYS32_ENTRY = 18  # the PVH entry point
_PT_LOAD, _PT_NOTE = 1, 4


def _lz4_legacy(payload: bytes) -> bytes:
    """Unpack lz4's legacy frame with the system's liblz4 (apt itself depends on it)."""
    try:
        library = ctypes.CDLL("liblz4.so.1")
    except OSError as exc:
        raise MissingTool("liblz4 is not installed", hint="apt-get install liblz4-1") from exc
    decode = library.LZ4_decompress_safe
    decode.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    decode.restype = ctypes.c_int
    out: list[bytes] = []
    room = ctypes.create_string_buffer(_LZ4_LEGACY_BLOCK_BYTES)
    position, total = len(_LZ4_LEGACY_MAGIC), 0
    while position + 4 <= len(payload):
        (size,) = struct.unpack_from("<I", payload, position)
        position += 4
        if not 0 < size <= len(payload) - position:
            break  # the 4 bytes of the unpacked size end the payload
        count = decode(payload[position : position + size], room, size, len(room))
        if count < 0:
            raise Corrupt("the kernel cannot be unpacked: a damaged lz4 block")
        out.append(room.raw[:count])
        total += count
        position += size
        if total > _MAX_KERNEL_BYTES:
            raise Corrupt("the kernel unpacks to more than 256 MiB")
    return b"".join(out)


class _Decoder(Protocol):
    """What the standard library's incremental decompressors have in common."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _whole(decoder: _Decoder, payload: bytes) -> bytes:
    """Unpack to the end of the stream: a part of a kernel looks like one, and would only fail once it is booted."""
    data = bytes(decoder.decompress(payload, _MAX_KERNEL_BYTES))
    if not decoder.eof:
        raise Corrupt("the kernel is cut short, or unpacks to more than 256 MiB")
    return data


def _zlib_any(payload: bytes) -> bytes:
    return _whole(zlib.decompressobj(wbits=31), payload)


def _lzma_any(payload: bytes) -> bytes:
    return _whole(lzma.LZMADecompressor(), payload)


def _zstd_any(payload: bytes) -> bytes:
    return _whole(zstd.ZstdDecompressor(), payload)


def _bzip2_any(payload: bytes) -> bytes:
    return _whole(bz2.BZ2Decompressor(), payload)


# In the order of likelihood; the magic says which one it is. The payload has 4 bytes of size at its end, hence
# decompressors that stop at the end of their stream.
_UNPACKERS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (_LZ4_LEGACY_MAGIC, _lz4_legacy),
    (b"\xfd7zXZ\x00", _lzma_any),
    (b"\x28\xb5\x2f\xfd", _zstd_any),
    (b"\x1f\x8b", _zlib_any),
    (b"BZh", _bzip2_any),
    (b"\x5d\x00\x00", _lzma_any),
)


_BARE = (_ELF_MAGIC, *(magic for magic, _unpacker in _UNPACKERS))


def extract_vmlinux(boot_image: bytes) -> bytes:
    """Return the kernel proper (an ELF file with a PVH entry note) out of a bzImage or a packed ELF (vmlinux.zst); an ELF
    is returned as it is.

    Raises Corrupt when it is no kernel or has no PVH note, MissingTool when the decompressor is not there.
    """
    elf = _unpack(boot_image if boot_image.startswith(_BARE) else _payload(boot_image))
    if not elf.startswith(_ELF_MAGIC):
        raise Corrupt("the boot image does not hold an ELF kernel")
    if not has_pvh_note(elf):
        raise Corrupt("the kernel has no PVH entry note", hint="use a kernel with CONFIG_PVH=y")
    return elf


def _payload(boot_image: bytes) -> bytes:
    if len(boot_image) < 0x250 or boot_image[0x202:0x206] != b"HdrS":
        raise Corrupt("not a Linux boot image")
    setup_sectors = boot_image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", boot_image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = boot_image[start : start + length]
    if not length or len(payload) != length:
        raise Corrupt("the boot image is truncated")
    return payload


def _unpack(payload: bytes) -> bytes:
    for magic, unpack in _UNPACKERS:
        if payload.startswith(magic):
            try:
                return unpack(payload)
            except (zlib.error, lzma.LZMAError, zstd.ZstdError, OSError, EOFError) as exc:
                raise Corrupt(f"the kernel cannot be unpacked: {exc}") from exc
    return payload


def has_pvh_note(elf: bytes) -> bool:
    """Tell whether a 64-bit little-endian ELF carries the note that lets a VMM start it directly."""
    try:
        if elf[:6] != _ELF_MAGIC + b"\x02\x01":
            return False
        (table,) = struct.unpack_from("<Q", elf, 0x20)
        size, count = struct.unpack_from("<HH", elf, 0x36)
        for i in range(count):
            kind, _flags, offset, _va, _pa, length = struct.unpack_from("<IIQQQQ", elf, table + i * size)
            if kind == _PT_NOTE and _notes_have_pvh(elf[offset : offset + length]):
                return True
    except struct.error:
        return False
    return False


def _notes_have_pvh(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\0":
            return True
        position += 12 + (name_size + 3) // 4 * 4 + (data_size + 3) // 4 * 4
    return False


def module_name(path: str) -> str:
    """Return a module's name from its path: "kernel/fs/erofs/erofs.ko.xz" -> "erofs" (dashes are underscores)."""
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def module_bytes(path: str, data: bytes) -> bytes:
    """Return a module's ELF, unpacked if the package ships it packed."""
    return data if path.endswith(".ko") else _unpack(data)


def module_depends(module: bytes) -> list[str]:
    """Return the names a module says it depends on, from its `.modinfo` strings."""
    match = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


def load_order(modules: Mapping[str, bytes], built_in: frozenset[str], wanted: Sequence[str]) -> list[str]:
    """Return the names to load, dependencies first, without what is built in.

    `modules` maps a name to its unpacked ELF. Raises Corrupt when one is neither there nor built in.
    """
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in order or name in built_in:
            return
        if name not in modules or name in path:
            raise Corrupt(f"the kernel package has no usable module {name!r}", details_path=list(path))
        for needed in module_depends(modules[name]):
            visit(needed, (*path, name))
        order.append(name)

    for name in wanted:
        visit(name, ())
    return order
