"""Root images of this store as others read them: as a tar archive, and as an OCI layout of one layer.

Only the form that `erofs.write_image` writes is read: extended inodes, data in whole blocks or wholly inline. An image is
checked by its hash where it is used; here every place is checked against its size, so that a damaged one is Corrupt and no
crash. This module must know nothing of names of images or of who wants them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from recess.errors import Corrupt
from recess.images.erofs import BLOCK, FIRST_NID, INODE, MAGIC, META_BLOCK, SLOT, XATTR_INDEX

_SUPER_AT = 1024
_DIRENT = struct.Struct("<QHBB")
_XATTR_HEAD, _XATTR_ENTRY = 12, struct.Struct("<BBH")
_INLINE = 2
_ENTRIES_MAX = 2_000_000
_XATTR_NAMES = {index: prefix for prefix, index in XATTR_INDEX.items()}
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE, stat.S_IFIFO: tarfile.FIFOTYPE,
}  # fmt: skip


@dataclass(frozen=True)
class _Inode:
    nid: int
    mode: int
    uid: int
    gid: int
    mtime_s: int
    links: int
    place: int  # a device's numbers, or where data is
    start: int
    size: int
    xattrs: bytes


class _Image:
    def __init__(self, file: BinaryIO) -> None:
        self._fd = file.fileno()
        self._bytes = os.fstat(self._fd).st_size
        if int.from_bytes(self._at(_SUPER_AT, 4), "little") != MAGIC:
            raise Corrupt("not a root image")

    def _at(self, start: int, size: int) -> bytes:
        self._check(start, size)
        return os.pread(self._fd, size, start)

    def _check(self, start: int, size: int) -> None:
        if start + size > self._bytes:
            raise Corrupt("the root image names a place beyond its end")

    def inode(self, nid: int) -> _Inode:
        at = META_BLOCK * BLOCK + nid * SLOT
        form, xattrs, mode, _, size, place, _, uid, gid, mtime, _, links = INODE.unpack(self._at(at, INODE.size))
        xattr_bytes = _XATTR_HEAD + 4 * (xattrs - 1) if xattrs else 0
        behind = at + INODE.size + xattr_bytes
        start = behind if form >> 1 == _INLINE else place * BLOCK
        return _Inode(
            nid, mode, uid, gid, mtime, links, place, start, size, self._at(at + INODE.size, xattr_bytes)
        )  # fmt: skip

    def content(self, inode: _Inode) -> bytes:
        return self._at(inode.start, inode.size)

    def reader(self, inode: _Inode) -> _Reader:
        self._check(inode.start, inode.size)
        return _Reader(self._fd, inode.start, inode.size)

    def children(self, inode: _Inode) -> Iterator[tuple[str, int]]:
        data = self.content(inode)
        for block in range(0, len(data), BLOCK):
            part = data[block : block + BLOCK]
            try:
                count = _DIRENT.unpack_from(part, 0)[1] // _DIRENT.size
                heads = [_DIRENT.unpack_from(part, _DIRENT.size * i) for i in range(count)]
            except struct.error as exc:
                raise Corrupt("the root image holds a folder that cannot be read") from exc
            for i, (nid, offset, _, _) in enumerate(heads):
                end = heads[i + 1][1] if i + 1 < count else len(part)
                name = part[offset:end].split(b"\0")[0].decode("utf-8", "surrogateescape")
                if not name or "/" in name:
                    raise Corrupt("the root image holds a name that is none")
                if name not in (".", ".."):
                    yield name, nid

    def walk(self) -> Iterator[tuple[str, _Inode]]:
        """Yield every path and its inode, folders before what is in them."""
        waiting, seen, count = [("", FIRST_NID)], set[int](), 0
        while waiting:
            path, nid = waiting.pop()
            inode = self.inode(nid)
            count += 1
            if count > _ENTRIES_MAX or (stat.S_ISDIR(inode.mode) and nid in seen):
                raise Corrupt("the root image's tree has no end")
            yield path, inode
            if stat.S_ISDIR(inode.mode):
                seen.add(nid)
                found = [(f"{path}/{name}" if path else name, child) for name, child in self.children(inode)]
                waiting += reversed(found)


def write_tar(root: Path, out: BinaryIO) -> None:
    """Write a root image's tree as a tar archive: owners, modes, times, links, devices and attributes. The same image gives
    the same bytes. Raises Corrupt."""
    with root.open("rb") as file:
        _write(_Image(file), out)


def _write(image: _Image, out: BinaryIO) -> None:
    first: dict[int, str] = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path, inode in image.walk():
            if not path:
                continue
            info = _member(path, inode)
            if info is None:
                continue
            if inode.links > 1 and not info.isdir():
                if inode.nid in first:
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, first[inode.nid], 0
                first.setdefault(inode.nid, path)
            if info.issym():
                info.linkname = image.content(inode).decode("utf-8", "surrogateescape")
            tar.addfile(info, image.reader(inode) if info.isreg() else None)


class _Reader(io.RawIOBase):
    """A part of a file, read piece by piece."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._at, self._left = fd, start, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = os.preadv(self._fd, [memoryview(buffer)[: self._left]], self._at)
        self._at, self._left = self._at + got, self._left - got
        return got


def _member(path: str, inode: _Inode) -> tarfile.TarInfo | None:
    kind = _TYPES.get(stat.S_IFMT(inode.mode))
    if kind is None:
        return None  # a socket: nothing that an archive could hold
    info = tarfile.TarInfo(path)
    info.type, info.mode = kind, stat.S_IMODE(inode.mode)
    info.uid, info.gid, info.mtime = inode.uid, inode.gid, inode.mtime_s
    info.size = inode.size if kind == tarfile.REGTYPE else 0
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor = (inode.place >> 8) & 0xFFF
        info.devminor = (inode.place & 0xFF) | ((inode.place >> 12) & 0xFFF00)
    info.pax_headers = {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape") for name, value in _xattrs(inode.xattrs)
    }
    return info


def _xattrs(raw: bytes) -> Iterator[tuple[str, bytes]]:
    at = _XATTR_HEAD
    while at + _XATTR_ENTRY.size <= len(raw):
        name_bytes, index, value_bytes = _XATTR_ENTRY.unpack_from(raw, at)
        at += _XATTR_ENTRY.size
        name, value = raw[at : at + name_bytes], raw[at + name_bytes : at + name_bytes + value_bytes]
        if index not in _XATTR_NAMES or len(value) < value_bytes:
            raise Corrupt("the root image holds attributes that cannot be read")
        yield _XATTR_NAMES[index] + name.decode(errors="surrogateescape"), value
        at += -(-(name_bytes + value_bytes) // 4) * 4


def write_layout(root: Path, config: Mapping[str, Any], folder: Path, name: str) -> str:
    """Write a root image as an OCI layout (image-layout.md, version 1.0) with one plain layer, called `name` in it; `config`
    says how it starts. Returns the image's id: its configuration's SHA-256, hex. Raises Corrupt, OSError as the disk has it."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    aside = folder / "layer"
    with aside.open("wb") as out:
        write_tar(root, out)
    with aside.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    layer = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{digest}", "size": aside.stat().st_size,
    }  # fmt: skip
    aside.rename(blobs / digest)

    def blob(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
        data = json.dumps(value, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{kind}.v1+json",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    about = {
        "architecture": "amd64", "os": "linux", "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }  # fmt: skip
    described = blob("config", about)
    manifest = blob("manifest", {"schemaVersion": 2, "config": described, "layers": [layer]})
    row = {**manifest, "annotations": {"org.opencontainers.image.ref.name": name}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [row]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(described["digest"]).removeprefix("sha256:")
