"""The host's side of a volume: one folder (or file) that is read, and written only below itself, whatever lies there.

Every name is reached from the folder's descriptor, one component at a time, links never followed: a link that a machine
(or anybody) put there leads nowhere. A file is replaced only if it is still the one that was looked at; otherwise Changed is
raised and the next look decides. Blocking.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from recess.errors import BadInput, Conflict, NotFound, OutOfSpace, RecessError, Unavailable
from recess.units import format_bytes
from recess.volumes.trees import DIR, ENTRIES_MAX, FILE, LINK, PATH_BYTES_MAX, Entry, is_name, leads_out, unchanged

PART = ".recess-part-"
_PIECE = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Changed(Conflict):
    """A file is not the one that was looked at any more, or something else is in its way: left for the next look."""


@dataclass
class Scan:
    """What is there. `left_out`: what is there and cannot be copied, and why. `absent`: not even the folder is there."""

    tree: dict[str, Entry] = field(default_factory=dict)
    bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    absent: bool = False

    @property
    def count(self) -> int:
        """How many names there are."""
        return len(self.tree) + len(self.left_out)


class HostSide:
    """One folder or file of this host. Close it; as a context manager it closes itself."""

    def __init__(self, path: Path) -> None:
        """Open. Raises NotFound, BadInput."""
        self.path = path
        self.single = "" if path.is_dir() else path.name
        try:
            if self.single and not stat.S_ISREG(path.stat().st_mode):
                raise BadInput(f"neither a folder nor a file: {path}")
            folder = path.parent if self.single else path
            self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise NotFound(
                f"no such folder on the host: {path}", hint=f"mkdir {path}", kind="folder", ref=str(path)
            ) from exc
        except OSError as exc:
            raise BadInput(f"{path}: {exc.strerror}") from exc

    def __enter__(self) -> HostSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; may be called twice."""
        root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    # --- reading -----------------------------------------------------------------------------------------------

    def scan(self, bytes_max: int, *, tidy: bool) -> Scan:
        """Return everything below. `tidy`: what a crash left of our own is removed. Raises BadInput over a bound,
        Unavailable for a folder that cannot be read: what is in it has not gone."""
        found = Scan()
        try:
            if self.single:
                self._note(found, "", self._root, self.single)
                return self._bounded(found, bytes_max)
            return self._walk(found, bytes_max, tidy=tidy)
        except OSError as exc:
            raise Unavailable(f"{self.path}: {exc.filename or ''}: {exc.strerror}") from exc

    def _walk(self, found: Scan, bytes_max: int, *, tidy: bool) -> Scan:
        for root, folders, files, fd in os.fwalk(".", dir_fd=self._root, follow_symlinks=False, onerror=_raise):
            prefix = "" if root == "." else root.removeprefix("./") + "/"
            for name in [*folders, *files]:
                if name.startswith(PART):
                    if tidy:
                        with contextlib.suppress(OSError):
                            os.unlink(name, dir_fd=fd)
                elif not is_name(name) or len((prefix + name).encode()) > PATH_BYTES_MAX:
                    found.left_out[repr(prefix + name)] = "its name cannot be carried over"
                else:
                    self._note(found, prefix + name, fd, name)
            folders[:] = [name for name in folders if prefix + name in found.tree]
            self._bounded(found, bytes_max)
        return found

    def _note(self, found: Scan, path: str, fd: int, name: str) -> None:
        try:
            entry = entry_at(fd, name)
        except FileNotFoundError:
            return
        if entry is None:
            found.left_out[path] = "neither file, folder nor link"
        elif entry.kind == FILE and not os.access(name, os.R_OK, dir_fd=fd, effective_ids=True):
            found.left_out[path] = "the server may not read it"
        else:
            found.tree[path] = entry
            found.bytes += entry.size

    def _bounded(self, found: Scan, bytes_max: int) -> Scan:
        if found.count > ENTRIES_MAX:
            raise BadInput(
                f"{self.path}: more than {ENTRIES_MAX} files", hint="a volume is copied: take a folder further down"
            )
        if found.bytes > bytes_max:
            raise BadInput(
                f"{self.path}: more than {format_bytes(bytes_max)}",
                hint="a volume is copied: take a smaller folder, or allow more (--mount ...,size=4G)",
            )
        return found

    def read(self, path: str, entry: Entry) -> Iterator[bytes]:
        """Yield exactly `entry.size` bytes of a file: one that shrank meanwhile is filled up, which the next look finds."""
        left = entry.size
        with self._parent(path) as (fd, name):
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        with os.fdopen(source, "rb") as file:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise Changed(f"{path}: no file any more")
            while left and (piece := file.read(min(left, _PIECE))):
                left -= len(piece)
                yield piece
        while left:
            yield bytes(min(left, _PIECE))
            left -= min(left, _PIECE)

    # --- writing -----------------------------------------------------------------------------------------------

    def put_file(
        self, path: str, source: IO[bytes], new: Entry, seen: Entry | None, *, like: Entry | None = None
    ) -> Entry:
        """Write a file as the machine has it in place of what was seen, with the permissions of `like` (default: what was
        seen); return it as it lies there now. Raises Changed, OutOfSpace, Unavailable."""
        mode = _mode(new, like or seen)
        with self._parent(path, make=True) as (fd, name):
            temp = PART + secrets.token_hex(8)
            try:
                size = _write(fd, temp, source, mode, new.mtime_ns)
                self._still(fd, name, seen, path)
                os.rename(temp, name, src_dir_fd=fd, dst_dir_fd=fd)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=fd)
        return Entry(FILE, size, new.mtime_ns, mode)

    def put_folder(self, path: str, seen: Entry | None) -> Entry:
        """Make a folder, in place of a file or link that was seen."""
        with self._parent(path, make=True) as (fd, name):
            now = self._still(fd, name, seen, path)
            if now is None or now.kind != DIR:
                if now is not None:
                    os.unlink(name, dir_fd=fd)
                os.mkdir(name, 0o755, dir_fd=fd)
        return Entry(DIR, mode=0o755)

    def put_link(self, path: str, target: str, seen: Entry | None) -> Entry:
        """Make a link, in place of a file or link that was seen. Raises Changed for one that leads out."""
        if leads_out(path, target):
            raise Changed(f"{path}: a link that leads out of the volume")
        with self._parent(path, make=True) as (fd, name):
            temp = PART + secrets.token_hex(8)
            os.symlink(target, temp, dir_fd=fd)
            try:
                self._still(fd, name, seen, path)
                os.rename(temp, name, src_dir_fd=fd, dst_dir_fd=fd)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=fd)
        return Entry(LINK, target=target)

    def remove(self, path: str, seen: Entry) -> None:
        """Remove what was seen; a folder only if it is empty by now. Raises Changed."""
        with self._parent(path) as (fd, name):
            if self._still(fd, name, seen, path) is None:
                return
            if seen.kind == DIR:
                os.rmdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)

    def put_aside(self, path: str, seen: Entry, tag: str) -> str:
        """Give what was seen another name, one that is free; return it."""
        with self._parent(path) as (fd, name):
            self._still(fd, name, seen, path)
            aside = self._free(fd, name, tag)
            os.rename(name, aside, src_dir_fd=fd, dst_dir_fd=fd)
        return _beside(path, aside)

    def put_beside(self, path: str, source: IO[bytes], new: Entry, tag: str, *, like: Entry | None) -> str:
        """Write the machine's version of a file under a free name beside it, with the same permissions; return that name."""
        with self._parent(path, make=True) as (fd, name):
            aside = self._free(fd, name, tag)
        made = _beside(path, aside)
        self.put_file(made, source, new, None, like=like)
        return made

    @staticmethod
    def _free(fd: int, name: str, tag: str) -> str:
        for number in range(1, 1000):
            aside = f"{name[:120]}.conflict-{tag}" + (f"-{number}" if number > 1 else "")
            if _lstat(fd, aside) is None:
                return aside
        raise Changed(f"{name}: there are too many conflicts beside it")

    @staticmethod
    def _still(fd: int, name: str, seen: Entry | None, path: str) -> Entry | None:
        now = entry_at(fd, name) if _lstat(fd, name) is not None else None
        if not unchanged(now, seen):
            raise Changed(f"{path}: changed on the host meanwhile")
        return now

    @contextlib.contextmanager
    def _parent(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder of a path; failures of the host come out as this house's errors."""
        parts = path.split("/") if not self.single else [path or self.single]
        if not all(map(is_name, parts)):
            raise Changed(f"{path!r}: not a name below a folder")
        fd = os.dup(self._root)
        try:
            for part in parts[:-1]:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=fd)
                below = os.open(part, _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, parts[-1]
        except OSError as exc:
            raise _failed(path, exc) from exc
        finally:
            os.close(fd)


def _raise(exc: OSError) -> None:
    raise exc


def entry_at(fd: int, name: str) -> Entry | None:
    """Return what has this name in a folder; None for a device, socket or pipe. Raises FileNotFoundError."""
    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
    mode = stat.S_IMODE(info.st_mode) & 0o777
    if stat.S_ISREG(info.st_mode):
        return Entry(FILE, info.st_size, info.st_mtime_ns, mode)
    if stat.S_ISDIR(info.st_mode):
        return Entry(DIR, mode=mode)
    if stat.S_ISLNK(info.st_mode):
        return Entry(LINK, target=os.readlink(name, dir_fd=fd))
    return None


def _lstat(fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _write(fd: int, name: str, source: IO[bytes], mode: int, mtime_ns: int) -> int:
    """Write a new file durably; return its size."""
    out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
    with os.fdopen(out, "wb") as file:
        while piece := source.read(_PIECE):
            file.write(piece)
        file.flush()
        os.fchmod(out, mode)
        os.utime(out, ns=(mtime_ns, mtime_ns))
        os.fsync(out)
        return file.tell()


def _mode(new: Entry, seen: Entry | None) -> int:
    """The host's own permissions stay; only whether it may be run is the machine's to say. No set-uid ever."""
    mode = seen.mode if seen is not None and seen.kind == FILE else 0o644
    return mode | (mode & 0o444) >> 2 if new.runs else mode & ~0o111


def _beside(path: str, name: str) -> str:
    folder, sep, _ = path.rpartition("/")
    return f"{folder}{sep}{name}"


def _failed(path: str, exc: OSError) -> RecessError:
    if exc.errno == 28:
        return OutOfSpace(f"no space left on the host for {path}")
    if exc.errno in (2, 17, 20, 21, 39, 40):  # gone, there already, another kind, not empty, a link
        return Changed(f"{path}: something else is there on the host")
    return Unavailable(f"{path}: {exc.strerror or exc}")


def member(path: str, entry: Entry, *, shared: bool) -> tarfile.TarInfo:
    """Return the archive's member for an entry. `shared`: users other than root may write it, too."""
    info = tarfile.TarInfo(path)
    info.mtime = entry.mtime_ns // 1_000_000_000
    if entry.kind == DIR:
        info.type, info.mode = tarfile.DIRTYPE, 0o777 if shared else entry.mode | 0o700
    elif entry.kind == LINK:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.target, 0o777
    else:
        info.size, info.mode = entry.size, entry.mode | 0o600 | (0o666 if shared else 0)
    return info
