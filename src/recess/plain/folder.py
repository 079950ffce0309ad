"""A folder as a guest's file system: the file half of `GuestLink`. Guest paths lie below the folder, `..` does not leave it.

Links in it are followed as the process that made them would follow them: this is a place, not a wall.
"""

from __future__ import annotations

import asyncio
import errno
import io
import posixpath
import shutil
import stat
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

from recess.errors import BadInput, GuestFailed, NotFound, OutOfSpace, Unsupported
from recess.guestlink.link import FileStat
from recess.ids import new_id

LIST_MAX = 10_000
ARCHIVE_BYTES_MAX = 256 << 20


class FolderFiles:
    """The files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, guest: str) -> Path:
        """Return where a guest path lives on the host."""
        return self._root / posixpath.normpath("/" + guest).lstrip("/")

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a whole file by temporary name and rename; parents are made."""
        await asyncio.to_thread(self._write, path, data, mode)

    def _write(self, path: str, data: bytes, mode: int) -> None:
        target = self.path(path)
        if target.is_dir():
            raise BadInput(f"is a folder: {path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.parent / f".{new_id('tmp')}"
        beside.write_bytes(data)
        beside.chmod(mode)
        beside.replace(target)

    async def read_file(self, path: str, limit: int = 64 << 20) -> bytes:
        """Return a whole file; raises NotFound, or BadInput over the limit."""
        target = self.path(path)
        if not target.is_file():
            raise NotFound(f"no such file in the machine: {path}", kind="file", ref=path)
        if target.stat().st_size > limit:
            raise BadInput(f"{path} is larger than {limit} bytes")
        return await asyncio.to_thread(target.read_bytes)

    async def stat(self, path: str) -> FileStat:
        """Return what is there; raises NotFound."""
        target = self.path(path)
        try:
            found = target.lstat()
        except OSError as exc:
            raise NotFound(f"no such file in the machine: {path}", kind="file", ref=path) from exc
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "other")
        return FileStat(path, kind, found.st_size, stat.S_IMODE(found.st_mode), found.st_mtime)

    async def list_dir(self, path: str) -> list[FileStat]:
        """Return at most 10,000 entries; raises NotFound, BadInput."""
        if (await self.stat(path)).kind != "dir":
            raise BadInput(f"not a folder: {path}")
        names = sorted(one.name for one in self.path(path).iterdir())[:LIST_MAX]
        return [await self.stat(posixpath.join(path, name)) for name in names]

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder; absent is not an error, a full folder without `recursive` is."""
        target = self.path(path)
        if not target.is_dir() or target.is_symlink():
            target.unlink(missing_ok=True)
            return
        if not recursive and any(target.iterdir()):
            raise BadInput(f"folder is not empty: {path}")
        await asyncio.to_thread(shutil.rmtree, target)

    async def put_tar(self, path: str, archive: AsyncIterator[bytes], *, sparse: bool = False) -> None:
        """Unpack files and folders of a tar stream below `path`; what would leave it, or be much larger than the archive, is
        refused before anything is written. Raises Unsupported for `sparse`: a small archive of a large file is held whole here."""
        if sparse:
            raise Unsupported("files with holes are unpacked whole here")
        data = bytearray()
        async for piece in archive:
            data += piece
            if len(data) > ARCHIVE_BYTES_MAX:
                raise BadInput(f"archive is larger than {ARCHIVE_BYTES_MAX} bytes")
        await asyncio.to_thread(_unpack, self.path(path), bytes(data))


def _unpack(target: Path, data: bytes) -> None:
    try:
        _unpack_members(target, data)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"no room for files of the machine: {exc.strerror}", guest_kind="no_space") from exc
        raise GuestFailed(f"cannot write files of the machine: {exc}") from exc


def _unpack_members(target: Path, data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()  # `filter=` is younger than the oldest Python we support
        if sum(member.size for member in members) > ARCHIVE_BYTES_MAX:  # one with holes says so itself
            raise BadInput(f"archive holds more than {ARCHIVE_BYTES_MAX} bytes")
        for member in members:
            if not (target / member.name).resolve().is_relative_to(target.resolve()):
                raise BadInput(f"tar member leaves the folder: {member.name}")
        target.mkdir(parents=True, exist_ok=True)
        for member in members:
            where = target / member.name
            content = tar.extractfile(member) if member.isfile() else None
            if member.isdir():
                where.mkdir(parents=True, exist_ok=True)
            elif content is not None:
                where.parent.mkdir(parents=True, exist_ok=True)
                where.write_bytes(content.read())
                where.chmod(member.mode & 0o777)
