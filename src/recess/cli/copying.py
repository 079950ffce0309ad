"""Tar streams on the caller's side of `recess cp`: packing files of this host, and unpacking what a machine sent.

What comes from a machine is hostile: nothing is written outside the folder, links are made last, so that no member is
written through one that came with it, and devices are refused. Blocking; knows nothing of servers.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from pathlib import Path
from typing import IO

from recess.errors import BadInput, OutOfSpace

MEMBERS_MAX = 2_000_000
_MODE = 0o777  # no set-uid, no sticky bits


def pack(source: Path, name: str, out: IO[bytes], *, follow: bool = False) -> list[str]:
    """Write a file or folder as a tar, called `name` in it (empty: only what is in the folder). Returns the pipes and devices
    that were left out, as they are called in it. Raises BadInput."""
    left: list[str] = []

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if member.isfile() or member.isdir() or member.issym() or member.islnk():
            return member
        left.append(member.name)
        return None

    if not source.exists() and not source.is_symlink():
        raise BadInput(f"{source}: no such file or folder")
    if not name and not source.is_dir():
        raise BadInput(f"{source} is no folder")
    try:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, dereference=follow) as tar:
            tar.add(source, arcname=name or ".", filter=plain)
    except OSError as exc:
        raise BadInput(f"{exc.filename or source}: {exc.strerror}") from exc
    return left


def unpack(source: IO[bytes], target: Path, name: str) -> None:
    """Unpack a machine's tar whose first member is called "x" (or lies below it): that is made as `target`/`name`, or,
    without a name, what is in it goes into `target`. Raises BadInput (hostile or damaged, or this host refuses)."""
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
                    _write(tar, member, place)
        for place, said in links:
            _clear(place)
            place.symlink_to(said)
    except (tarfile.TarError, EOFError, UnicodeError) as exc:
        raise BadInput(f"what the machine sent is no tar archive: {exc}") from exc
    except OSError as exc:
        if exc.errno == 28:
            raise OutOfSpace(f"no space left for {exc.filename or target}") from exc
        raise BadInput(f"{exc.filename or target}: {exc.strerror}") from exc


def _place(said: str, target: Path, name: str) -> Path:
    first, _, rest = posixpath.normpath(said).partition("/")
    parts = [part for part in rest.split("/") if part]
    if said.startswith("/") or first != "x" or ".." in parts or "\0" in said:
        raise BadInput(f"the machine sent a path that it should not: {said[:80]!r}")
    return target.joinpath(*([name] if name else []), *parts)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    if member.isdir():
        if not place.is_dir():
            _clear(place)
            place.mkdir()
        place.chmod(member.mode & _MODE | stat.S_IRWXU)
        return
    content = tar.extractfile(member) if member.isfile() else None
    if content is None:
        return  # a fifo: means nothing here
    _clear(place)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as out:
        while piece := content.read(1 << 20):
            out.write(piece)
        os.fchmod(fd, member.mode & _MODE)
    os.utime(place, (member.mtime, member.mtime))


def _link(existing: Path, place: Path) -> None:
    _clear(place)
    os.link(existing, place, follow_symlinks=False)


def _clear(place: Path) -> None:
    """Make room for a file or link; a folder stays, and the next step fails and says so."""
    if place.is_symlink() or place.is_file():
        place.unlink()
