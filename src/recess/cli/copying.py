"""Tar streams on the caller's side of `recess cp`: packing files of this host, and unpacking what a machine sent.

What comes from a machine is hostile: nothing is written outside the folder, links are made last, so that no member is
written through one that came with it, and devices are refused. Blocking; knows nothing of servers.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from recess.errors import BadInput, OutOfSpace

MEMBERS_MAX = 2_000_000
PIECES_MAX = 4096  # of data in a file with holes; what lies behind the last of them is taken as data
_PIECE_BYTES = 1 << 20
_PLAIN = 0o777
_RIGHTS = 0o7000  # set-uid, set-gid, sticky


@dataclass
class Packed:
    """What was packed: the pipes and devices that were `left` out, as they are called in it, and whether there are files
    `with_holes`, of which only the data was taken."""

    left: list[str] = field(default_factory=list)
    with_holes: bool = False


def pack(source: Path, name: str, out: IO[bytes], *, follow: bool = False, holes: bool = True) -> Packed:
    """Write a file or folder as a tar, called `name` in it (empty: only what is in the folder). `holes`: files that have some are
    written as GNU's sparse format 1.0 has them. Raises BadInput."""
    packed = Packed()

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if member.isfile() or member.isdir() or member.issym() or member.islnk():
            return member
        packed.left.append(member.name)
        return None

    if not source.exists() and not source.is_symlink():
        raise BadInput(f"{source}: no such file or folder")
    if not name and not source.is_dir():
        raise BadInput(f"{source} is a file, no folder")
    try:
        with _Tar(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, dereference=follow) as tar:
            tar.packed = packed if holes else None
            tar.add(source, arcname=name or ".", filter=plain)
    except OSError as exc:
        raise BadInput(f"{exc.filename or source}: {exc.strerror or exc}") from exc
    return packed


class _Tar(tarfile.TarFile):
    """Writes files with holes as their data, if there is a `packed` to note that in."""

    packed: Packed | None = None

    def addfile(self, tarinfo: tarfile.TarInfo, fileobj: Any = None) -> None:
        """Add a member, as the base class does."""
        pieces = None
        if self.packed is not None and fileobj is not None and tarinfo.isreg():
            pieces = _pieces(fileobj.fileno(), tarinfo.size)
        if pieces is None or fileobj is None:
            super().addfile(tarinfo, fileobj)
            return
        numbers = [len(pieces), *(number for piece in pieces for number in piece)]
        table = "".join(f"{number}\n" for number in numbers).encode()
        table += bytes(-len(table) % tarfile.BLOCKSIZE)
        tarinfo.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": tarinfo.name,
            "GNU.sparse.realsize": str(tarinfo.size),
        }  # fmt: skip
        tarinfo.size = len(table) + sum(length for _, length in pieces)
        source = io.BufferedReader(_Pieces(table, fileobj.fileno(), pieces), 1 << 20)
        super().addfile(tarinfo, source)
        assert self.packed is not None  # noqa: S101 - pieces were looked for
        self.packed.with_holes = True


class _Pieces(io.RawIOBase):
    """A table and then pieces of a file, as one. A file that shrinks meanwhile ends early, which whoever reads it finds."""

    def __init__(self, table: bytes, fd: int, pieces: list[tuple[int, int]]) -> None:
        self._table = table
        self._fd = fd
        self._left = [piece for piece in pieces if piece[1]]

    def readable(self) -> bool:
        """Say that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read on."""
        if self._table:
            data, self._table = self._table[: len(buffer)], self._table[len(buffer) :]
        elif self._left:
            offset, length = self._left[0]
            data = os.pread(self._fd, min(length, len(buffer)), offset)
            if len(data) < length:
                self._left[0] = (offset + len(data), length - len(data))
            else:
                del self._left[0]
        else:
            data = b""
        buffer[: len(data)] = data
        return len(data)


def _pieces(fd: int, size: int) -> list[tuple[int, int]] | None:
    """Return where data lies in a file, by offset and length; None when it has no holes, or its file system does not say."""
    if os.fstat(fd).st_blocks * 512 >= size:
        return None
    found: list[tuple[int, int]] = []
    at = 0
    try:
        while at < size:
            try:
                begin = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            at = size if len(found) + 1 >= PIECES_MAX else min(size, os.lseek(fd, begin, os.SEEK_HOLE))
            found.append((begin, at - begin))
    except OSError:
        return None
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    if found == [(0, size)] or any(length <= 0 for _, length in found):
        return None
    return found if found and sum(found[-1]) == size else [*found, (size, 0)]


def unpack(source: IO[bytes], target: Path, name: str, *, rights: bool = False) -> int:
    """Unpack a machine's tar whose first member is called "x" (or lies below it): that is made as `target`/`name`, or,
    without a name, what is in it goes into `target`. `rights`: set-uid, set-gid and sticky bits as well; returns how many files
    had such that were dropped. Raises BadInput (hostile or damaged, or this host refuses)."""
    dropped = 0
    mask = _PLAIN | (_RIGHTS if rights else 0)
    links: list[tuple[Path, str]] = []
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            for count, member in enumerate(tar):
                if count > MEMBERS_MAX:
                    raise BadInput("the machine sent too many files")
                place = _place(member.name, target, name)
                if place == target:
                    continue  # the folder itself, which is the caller's
                if member.issym():
                    links.append((place, member.linkname))
                elif member.islnk():
                    _link(_place(member.linkname, target, name), place)
                else:
                    _write(tar, source, member, place, mask)
                    dropped += bool(member.isfile() and member.mode & _RIGHTS & ~mask)
        for place, said in links:
            _clear(place)
            place.symlink_to(said)
    except (tarfile.TarError, EOFError, ValueError) as exc:
        raise BadInput(f"what the machine sent is no tar archive: {exc}") from exc
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise OutOfSpace(f"no space left for {exc.filename or target}") from exc
        raise BadInput(f"{exc.filename or target}: {exc.strerror}") from exc
    return dropped


def _place(said: str, target: Path, name: str) -> Path:
    first, _, rest = posixpath.normpath(said).partition("/")
    parts = [part for part in rest.split("/") if part]
    if said.startswith("/") or first != "x" or ".." in parts or "\0" in said:
        raise BadInput(f"the machine sent a path that it should not: {said[:80]!r}")
    return target.joinpath(*([name] if name else []), *parts)


def _write(tar: tarfile.TarFile, source: IO[bytes], member: tarfile.TarInfo, place: Path, mask: int) -> None:
    if member.isdir():
        if not place.is_dir():
            _clear(place)
            place.mkdir()
        place.chmod(member.mode & mask | stat.S_IRWXU)
        return
    content = tar.extractfile(member) if member.isfile() else None
    if content is None:
        return  # a fifo: means nothing here
    _clear(place)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as out:
        if member.sparse is None:
            while piece := content.read(_PIECE_BYTES):
                out.write(piece)
        else:
            _write_pieces(source, member, out)
        os.fchmod(fd, member.mode & mask)
    os.utime(place, (member.mtime, member.mtime))


def _write_pieces(source: IO[bytes], member: tarfile.TarInfo, out: IO[bytes]) -> None:
    """Write a file with holes: only its data, in order, and what is behind the last piece is a hole. Leaves `source` where it
    was: tarfile reads on from there."""
    here, end = source.tell(), 0
    source.seek(member.offset_data)
    for offset, length in cast("list[tuple[int, int]]", member.sparse):
        if not end <= offset <= offset + length <= member.size:
            raise BadInput(f"the machine sent a wrong map of a file with holes: {member.name[:80]!r}")
        out.seek(offset)
        end = offset + length
        while length:
            piece = source.read(min(length, _PIECE_BYTES))
            if not piece:
                raise EOFError("it breaks off")
            out.write(piece)
            length -= len(piece)
    out.truncate(member.size)
    source.seek(here)


def _link(existing: Path, place: Path) -> None:
    _clear(place)
    os.link(existing, place, follow_symlinks=False)


def _clear(place: Path) -> None:
    """Make room for a file or link; a folder stays, and the next step fails and says so."""
    if place.is_symlink() or place.is_file():
        place.unlink()
