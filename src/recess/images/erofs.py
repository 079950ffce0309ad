"""Writes a file tree as an uncompressed EROFS image in which every file starts on a page of its own.

Why not mkfs.erofs: images are built by ordinary users from tar archives (owners, device nodes), the version in
Debian 12 reads only folders, and it packs the tails of files beside their inodes. Here a page of a file in the
guest's page cache is always a 4 KiB block of the image, so a snapshot refers to it instead of storing it. The output
depends on the tree alone: fixed UUID, sorted paths, no build time.

Format: Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux 6.1. Only what that kernel reads
without optional features is used: extended inodes, FLAT_PLAIN data, FLAT_INLINE for links and small folders, inline
xattrs. This module must know nothing of images or packages.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from recess.errors import Corrupt
from recess.images.tree import Node

BLOCK = 4096
MAGIC = 0xE0F5E1E2
_FEATURE_COMPAT_SB_CHECKSUM = 1
SLOT = 32
INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBB")
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHB37x")
_PLAIN, _INLINE = 0, 2
FIRST_NID = 2  # inode number 0 would be hidden by readdir
META_BLOCK = 1
_UUID = bytes.fromhex("5ec0e550a9c84b7f8f0e726563657373")
_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
XATTR_INDEX = {"user.": 1, "trusted.": 4, "security.": 6}


@dataclass
class _Inode:
    node: Node
    links: int = 1
    xattrs: bytes = b""
    children: list[tuple[bytes, str]] = field(default_factory=list)  # (name, path), sorted by name
    inline: bytes = b""
    layout: int = _PLAIN
    nid: int = 0
    size: int = 0
    block: int = 0


def write_image(nodes: Mapping[str, Node], archive: Path, target: Path) -> int:
    """Write the tree as an image and return its size in bytes (a multiple of 4096).

    `archive` holds the content that nodes refer to by offset. Raises Corrupt when a hard link leads nowhere or the
    archive is shorter than its nodes say; OSError as the disk has it.
    """
    inodes, home_of = _collect(nodes)
    data_block = META_BLOCK + _assign_nids(inodes)
    position = data_block
    for inode in inodes.values():
        if inode.layout == _PLAIN and inode.size:
            inode.block = position
            position += -(-inode.size // BLOCK)
    with archive.open("rb") as source, target.open("wb") as out:
        out.write(bytes(data_block * BLOCK))
        for inode in inodes.values():
            if inode.layout == _PLAIN and inode.size:
                _write_data(inode, inodes, home_of, source, out)
        for inode in inodes.values():
            _write_inode(inode, inodes, home_of, out)
        out.seek(0)
        out.write(_superblock(len(inodes), position, inodes[""].nid))
    return position * BLOCK


def _collect(nodes: Mapping[str, Node]) -> tuple[dict[str, _Inode], dict[str, str]]:
    """Return inodes by path, folders first (they are read most), and for every path the one that holds its inode."""
    home_of = {path: _resolve(nodes, path) for path in nodes}
    order = sorted(nodes, key=lambda p: (not stat.S_ISDIR(nodes[p].mode), p.encode("utf-8", "surrogateescape")))
    inodes = {path: _Inode(nodes[path], links=0) for path in order if home_of[path] == path}
    for path in order:
        inode = inodes[home_of[path]]
        inode.links += 1
        if path:
            parent, _, name = path.rpartition("/")
            if not stat.S_ISDIR(nodes[parent].mode):
                raise Corrupt(f"{path!r} lies below something that is no folder")
            inodes[parent].children.append((name.encode("utf-8", "surrogateescape"), path))
            if stat.S_ISDIR(inode.node.mode):
                inodes[parent].links += 1
    for path, inode in inodes.items():
        inode.xattrs = _xattr_body(inode.node.xattrs)
        if stat.S_ISDIR(inode.node.mode):
            inode.links += 1
            parent = path.rpartition("/")[0]
            inode.children = sorted([*inode.children, (b".", path), (b"..", parent)])
            inode.size = _directory_size(inode)
        elif inode.node.data is not None:
            inode.size = len(inode.node.data)
        else:
            inode.size = inode.node.size if stat.S_ISREG(inode.node.mode) else 0
    return inodes, home_of


def _resolve(nodes: Mapping[str, Node], path: str) -> str:
    for _ in range(40):
        target = nodes[path].hardlink_to
        if not target:
            return path
        if target not in nodes:
            break
        path = target
    raise Corrupt(f"the hard link {path!r} leads nowhere")


def _xattr_body(attributes: Mapping[str, bytes]) -> bytes:
    entries = b""
    for name, value in sorted(attributes.items()):
        prefix = next((p for p in XATTR_INDEX if name.startswith(p)), None)
        if prefix is None:
            continue  # system.* and the like are made by the kernel
        short = name.removeprefix(prefix).encode()
        entry = struct.pack("<BBH", len(short), XATTR_INDEX[prefix], len(value)) + short + value
        entries += entry + bytes(-len(entry) % 4)
    return bytes(12) + entries if entries else b""


def _assign_nids(inodes: Mapping[str, _Inode]) -> int:
    """Give every inode its place in the metadata area, the root first; return the area's size in blocks."""
    offset = FIRST_NID * SLOT
    for inode in inodes.values():
        head = INODE.size + len(inode.xattrs)
        small = stat.S_ISLNK(inode.node.mode) or stat.S_ISDIR(inode.node.mode)
        if small and 0 < inode.size <= BLOCK // 2 and head + inode.size <= BLOCK:
            inode.layout = _INLINE  # must not cross a block: the kernel refuses that
            if offset // BLOCK != (offset + head + inode.size - 1) // BLOCK:
                offset = -(-offset // BLOCK) * BLOCK
            head += inode.size
        inode.nid = offset // SLOT
        offset += -(-head // SLOT) * SLOT
    return -(-offset // BLOCK)


def _directory_blocks(inode: _Inode) -> list[list[tuple[bytes, str]]]:
    blocks: list[list[tuple[bytes, str]]] = []
    used = BLOCK + 1
    for child in inode.children:
        need = _DIRENT.size + len(child[0])
        if used + need > BLOCK:
            blocks.append([])
            used = 0
        blocks[-1].append(child)
        used += need
    return blocks


def _directory_size(inode: _Inode) -> int:
    blocks = _directory_blocks(inode)
    return (len(blocks) - 1) * BLOCK + sum(_DIRENT.size + len(name) for name, _path in blocks[-1])


def _directory_bytes(inode: _Inode, inodes: Mapping[str, _Inode], home_of: Mapping[str, str]) -> bytes:
    out = b""
    for block in _directory_blocks(inode):
        names_at = len(block) * _DIRENT.size
        heads = names = b""
        for name, path in block:
            child = inodes[home_of[path]]
            kind = _FILE_TYPES[stat.S_IFMT(child.node.mode)]
            heads += _DIRENT.pack(child.nid, names_at + len(names), kind, 0)
            names += name
        out += bytes(-len(out) % BLOCK) + heads + names
    return out


def _content(inode: _Inode, inodes: Mapping[str, _Inode], home_of: Mapping[str, str]) -> bytes | None:
    """Return what is in memory anyway; None for a file in the archive."""
    if stat.S_ISDIR(inode.node.mode):
        return _directory_bytes(inode, inodes, home_of)
    return inode.node.data


def _write_data(
    inode: _Inode, inodes: Mapping[str, _Inode], home_of: Mapping[str, str], source: BinaryIO, out: BinaryIO
) -> None:
    out.seek(inode.block * BLOCK)
    content = _content(inode, inodes, home_of)
    if content is not None:
        out.write(content)
    else:
        source.seek(inode.node.offset)
        left = inode.size
        while left:
            piece = source.read(min(left, 1 << 20))
            if not piece:
                raise Corrupt(f"the archive ends inside {inode.node.path!r}")
            out.write(piece)
            left -= len(piece)
    out.write(bytes(-inode.size % BLOCK))


def _write_inode(inode: _Inode, inodes: Mapping[str, _Inode], home_of: Mapping[str, str], out: BinaryIO) -> None:
    node = inode.node
    major, minor = node.device
    place = inode.block
    if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        place = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    xattr_count = (len(inode.xattrs) - 12) // 4 + 1 if inode.xattrs else 0
    head = INODE.pack(
        1 | (inode.layout << 1),
        xattr_count,
        node.mode,
        0,
        inode.size,
        place,
        inode.nid & 0xFFFFFFFF,
        node.uid,
        node.gid,
        max(node.mtime_s, 0),
        0,
        inode.links,
    )
    tail = (_content(inode, inodes, home_of) or b"") if inode.layout == _INLINE else b""
    out.seek(META_BLOCK * BLOCK + inode.nid * SLOT)
    out.write(head + inode.xattrs + tail)


def _superblock(inodes: int, blocks: int, root_nid: int) -> bytes:
    def pack(checksum: int) -> bytes:
        return bytes(1024) + _SUPER.pack(
            MAGIC,
            checksum,
            _FEATURE_COMPAT_SB_CHECKSUM,
            12,
            0,
            root_nid,
            inodes,
            0,
            0,
            blocks,
            META_BLOCK,
            0,
            _UUID,
            b"recess",
            0,
            0,
            0,
            0,
            0,
        )

    whole = pack(0)
    checksum = _crc32c(whole[1024:] + bytes(BLOCK - len(whole)))
    return pack(checksum)


def _crc32c(data: bytes) -> int:
    """Return the kernel's crc32c(~0, data): Castagnoli, reflected, without the final inversion."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc
