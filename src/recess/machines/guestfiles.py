"""The machine's side of a volume: what lies below a folder of a guest, read, written and removed through its link.

The guest is hostile: names, numbers and counts are checked here, an archive of one file is read to a bound, and what it
claims to be is not believed. Paths given in are relative, as in `recess.volumes`; "" is a volume that is one file.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import tarfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from recess.errors import BadInput, GuestFailed, NotFound, Unsupported
from recess.guestlink.link import FileStat, GuestLink, TarReader
from recess.units import format_bytes
from recess.volumes.hostside import HostSide, Scan, member
from recess.volumes.trees import DIR, ENTRIES_MAX, FILE, LINK, PATH_BYTES_MAX, Entry, is_name, time_ns

LIST_MAX = 10_000  # what a guest lists of one folder at most
AT_ONCE = 8
LINKS_MAX = 5_000
_LINK_BYTES_MAX = 16 << 10
_BATCH_BYTES = 256 << 10
_SLACK = 64 << 10  # an archive's frame around one file
_KINDS = {"file": FILE, "dir": DIR, "symlink": LINK}


class GuestSide:
    """One folder or file of a guest. `spool`: a folder of the host for what is on its way. `place`: where it is read and written
    if not at its target."""

    def __init__(self, link: GuestLink, target: str, *, single: bool, spool: Path, place: str = "") -> None:
        """Raises Unsupported for a guest that cannot be read as archives."""
        if not isinstance(link, TarReader):
            raise Unsupported("this driver's machines cannot have volumes: their files cannot be read as archives")
        self._link: GuestLink = link
        self._tar: TarReader = link
        self._target = posixpath.normpath(target)
        self._place = posixpath.normpath(place or target)
        self._single = single
        self._spool = spool
        self._room = asyncio.Semaphore(AT_ONCE)

    def _at(self, path: str) -> str:
        return posixpath.join(self._place, path) if path else self._place

    # --- reading -----------------------------------------------------------------------------------------------

    async def scan(self, bytes_max: int) -> Scan:
        """Return everything below; nothing if the folder is not there. Raises BadInput over a bound, GuestFailed."""
        found = Scan()
        try:
            top = await self._link.stat(self._place)
        except NotFound:
            found.absent = True
            return found
        if self._single:
            self._note(found, "", top)
        elif top.kind != "dir":
            raise BadInput(f"{self._target} in the machine is no folder")
        level = [] if self._single else [""]
        while level:
            listed = await asyncio.gather(*(self._list(folder) for folder in level))
            below = []
            for folder, rows in zip(level, listed, strict=True):
                for row in rows:
                    path = self._note_in(found, folder, row)
                    if path and row.kind == "dir":
                        below.append(path)
            self._bounded(found, bytes_max)
            level = below
        await self._read_links(found)
        return found

    async def _list(self, folder: str) -> list[FileStat]:
        async with self._room:
            try:
                rows = await self._link.list_dir(self._at(folder))
            except (NotFound, BadInput):
                return []  # it went away meanwhile
        if len(rows) >= LIST_MAX:
            raise BadInput(f"{posixpath.join(self._target, folder)} in the machine holds {LIST_MAX} files or more")
        return rows

    def _note_in(self, found: Scan, folder: str, row: FileStat) -> str:
        name = posixpath.basename(row.path)
        path = posixpath.join(folder, name)
        if row.path != self._at(path) or not is_name(name) or len(path.encode()) > PATH_BYTES_MAX:
            found.left_out[repr(row.path[:200])] = "its name cannot be carried over"
            return ""
        self._note(found, path, row)
        return path

    def _note(self, found: Scan, path: str, row: FileStat) -> None:
        kind = _KINDS.get(row.kind, "")
        if not kind or row.size < 0:
            found.left_out[path] = "neither file, folder nor link"
            return
        size = row.size if kind == FILE else 0
        found.tree[path] = Entry(kind, size, time_ns(row.mtime_s) if kind == FILE else 0, row.mode & 0o777)
        found.bytes += size

    def _bounded(self, found: Scan, bytes_max: int) -> None:
        if found.count > ENTRIES_MAX:
            raise BadInput(f"{self._target} in the machine holds more than {ENTRIES_MAX} files")
        if found.bytes > bytes_max:
            raise BadInput(f"{self._target} in the machine holds more than {format_bytes(bytes_max)}")

    async def _read_links(self, found: Scan) -> None:
        links = [path for path, entry in found.tree.items() if entry.kind == LINK]
        if len(links) > LINKS_MAX:
            raise BadInput(f"{self._target} in the machine holds more than {LINKS_MAX} links")

        async def one(path: str) -> None:
            try:
                target = await self._read_link(path)
            except (NotFound, BadInput):
                del found.tree[path]
                found.left_out[path] = "its target cannot be read"
            else:
                found.tree[path] = Entry(LINK, target=target)

        await asyncio.gather(*map(one, links))

    async def _read_link(self, path: str) -> str:
        async with self._room:
            with TemporaryFile(dir=self._spool) as spool:
                await self._fetch(path, spool, _LINK_BYTES_MAX)
                first = await asyncio.to_thread(_first_member, spool)
        if first is None or not first.issym():
            raise BadInput(f"{path}: no link any more")
        return first.linkname

    async def _fetch(self, path: str, spool: IO[bytes], limit: int) -> None:
        size = 0
        async with aclosing(self._tar.get_tar(self._at(path), name="x")) as stream:
            async for piece in stream:
                size += len(piece)
                if size > limit + _SLACK:
                    raise BadInput(f"{path}: the machine sends more than it said")
                await asyncio.to_thread(spool.write, piece)
        spool.seek(0)

    async def open_file(self, path: str, entry: Entry, spool: IO[bytes]) -> IO[bytes]:
        """Return a file's content, brought into `spool`. Raises NotFound, BadInput (no file any more, or a larger one)."""
        await self._fetch(path, spool, entry.size)
        content = await asyncio.to_thread(_first_content, spool)
        if content is None:
            raise BadInput(f"{path}: no file any more, or cut short")
        return content

    def spool(self) -> IO[bytes]:
        """Return a file without a name for what is on its way; the caller closes it."""
        return TemporaryFile(dir=self._spool)

    # --- writing -----------------------------------------------------------------------------------------------

    async def put(self, host: HostSide, entries: Sequence[tuple[str, Entry]], *, shared: bool) -> None:
        """Copy entries of the host in, folders before what is in them. Raises GuestFailed (say its disk is full), Changed."""
        folder, name = posixpath.split(self._place) if self._single else (self._place, "")
        await self._link.put_tar(folder or "/", _archive(host, entries, name, shared=shared))

    async def make_root(self) -> None:
        """Make the folder itself, so that an empty volume is there, too."""
        if not self._single:
            await self._link.put_tar("/", _folder(self._place.lstrip("/")))

    async def remove(self, path: str) -> bool:
        """Remove a file, or a folder that is empty; False when it is not."""
        try:
            await self._link.remove(self._at(path))
        except (BadInput, GuestFailed):
            return False
        return True

    async def clear(self) -> None:
        """Remove what an image has at this place: a volume is laid over it."""
        await self._link.remove(self._place, recursive=True)


async def _folder(path: str) -> AsyncIterator[bytes]:
    yield member(path, Entry(DIR, mode=0o755), shared=False).tobuf(tarfile.PAX_FORMAT) + bytes(1024)


async def _archive(
    host: HostSide, entries: Sequence[tuple[str, Entry]], name: str, *, shared: bool
) -> AsyncIterator[bytes]:
    """A tar that is made while it is sent, in pieces of some size: little of it is held."""
    pieces = _pieces(host, entries, name, shared=shared)
    while batch := await asyncio.to_thread(_batch, pieces):
        yield batch


def _pieces(host: HostSide, entries: Sequence[tuple[str, Entry]], name: str, *, shared: bool) -> Iterator[bytes]:
    for path, entry in entries:
        yield member(path or name, entry, shared=shared).tobuf(tarfile.PAX_FORMAT)
        if entry.kind == FILE:
            yield from host.read(path, entry)
            yield bytes(-entry.size % 512)
    yield bytes(1024)


def _batch(pieces: Iterator[bytes]) -> bytes:
    batch = bytearray()
    for piece in pieces:
        batch += piece
        if len(batch) >= _BATCH_BYTES:
            break
    return bytes(batch)


def _first_member(spool: IO[bytes]) -> tarfile.TarInfo | None:
    try:
        with tarfile.open(fileobj=spool, mode="r:") as tar:
            return tar.next()
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as exc:
        raise BadInput(f"what the machine sent is no tar archive: {exc}") from exc


def _first_content(spool: IO[bytes]) -> IO[bytes] | None:
    try:
        tar = tarfile.open(fileobj=spool, mode="r:")  # noqa: SIM115 - it ends with the spool
        first = tar.next()
        if first is None or not first.isreg() or first.sparse:
            return None
        whole = first.offset_data + first.size <= os.fstat(spool.fileno()).st_size
        return tar.extractfile(first) if whole else None
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as exc:
        raise BadInput(f"what the machine sent is no tar archive: {exc}") from exc
