"""Files of a machine with the shape of E2B's `files`. Relative paths start at /root, or at the image's folder for `cwd`."""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import IO, Any, Literal, overload

from recess.adapters.e2b_types import (
    EntryInfo,
    FileNotFoundException,
    FilesystemEvent,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    WriteInfo,
    told,
)
from recess.sdk.machine import Machine
from recess.sdk.machine_files import FileInfo, Watch

HOME = "/root"
RECURSIVE_DEPTH = 16
PIECE_BYTES = 65536
Data = str | bytes | IO[Any] | Iterable[bytes]
_EVENTS = {
    "created": FilesystemEventType.CREATE, "changed": FilesystemEventType.WRITE, "removed": FilesystemEventType.REMOVE
}  # fmt: skip


class WatchHandle:
    """What changes in a folder, by comparing listings at each call (see `recess.sdk.machine_files.Watch`)."""

    def __init__(self, watch: Watch, folder: str) -> None:
        self._watch: Watch | None = watch
        self._folder = folder.rstrip("/") + "/"

    def get_new_events(self, request_timeout: float | None = None) -> list[FilesystemEvent]:
        """Return the changes since the last call."""
        if self._watch is None:
            return []
        with told(FileNotFoundException):
            found = self._watch.changes()
        return [FilesystemEvent(one.path.removeprefix(self._folder), _EVENTS[one.what]) for one in found]

    def stop(self, request_timeout: float | None = None) -> None:
        """Look no more."""
        self._watch = None


class Filesystem:
    """The files of one machine. `user` is accepted and ignored: files are read and written as root."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @overload
    def read(
        self, path: str, format: Literal["text"] = "text", user: str | None = None, request_timeout: float | None = None
    ) -> str: ...

    @overload
    def read(
        self, path: str, format: Literal["bytes"], user: str | None = None, request_timeout: float | None = None
    ) -> bytearray: ...

    @overload
    def read(
        self, path: str, format: Literal["stream"], user: str | None = None, request_timeout: float | None = None
    ) -> Iterator[bytes]: ...

    def read(
        self, path: str, format: str = "text", user: str | None = None, request_timeout: float | None = None
    ) -> str | bytearray | Iterator[bytes]:
        """Return a whole file. Raises FileNotFoundException."""
        with told(FileNotFoundException):
            data = self._machine.files.read(_full(path))
        if format == "text":
            return data.decode(errors="replace")
        if format == "bytes":
            return bytearray(data)
        if format == "stream":
            return (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))
        raise InvalidArgumentException(f"format: text, bytes or stream, not {format!r}")

    def write(self, path: str, data: Data, user: str | None = None, request_timeout: float | None = None) -> WriteInfo:
        """Write a whole file; its folders are made."""
        full = _full(path)
        with told(FileNotFoundException):
            self._machine.files.write(full, _bytes(data))
        return WriteInfo(posixpath.basename(full), FileType.FILE, full)

    def write_files(
        self, files: Sequence[dict[str, Any]], user: str | None = None, request_timeout: float | None = None
    ) -> list[WriteInfo]:
        """Write several: `{"path", "data"}` each."""
        return [self.write(str(one["path"]), one["data"]) for one in files]

    def list(
        self, path: str, depth: int | None = 1, user: str | None = None, request_timeout: float | None = None
    ) -> list[EntryInfo]:
        """Return what is in a folder, down to `depth`."""
        with told(FileNotFoundException):
            return [_entry(one) for one in self._machine.files.list(_full(path), depth=1 if depth is None else depth)]

    def exists(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Tell whether anything is there."""
        with told():
            return self._machine.files.exists(_full(path))

    def get_info(self, path: str, user: str | None = None, request_timeout: float | None = None) -> EntryInfo:
        """Return what is there. Raises FileNotFoundException."""
        with told(FileNotFoundException):
            return _entry(self._machine.files.stat(_full(path)))

    def remove(self, path: str, user: str | None = None, request_timeout: float | None = None) -> None:
        """Remove a file, or a folder with all in it. Raises FileNotFoundException."""
        self.get_info(path)
        with told(FileNotFoundException):
            self._machine.files.remove(_full(path), recursive=True)

    def rename(
        self, old_path: str, new_path: str, user: str | None = None, request_timeout: float | None = None
    ) -> EntryInfo:
        """Give a file another name, by the machine's `mv`."""
        self.get_info(old_path)
        with told(FileNotFoundException):
            done = self._machine.exec(["mv", "-T", "--", _full(old_path), _full(new_path)], timeout_s=60.0)
        if not done.ok:
            raise InvalidArgumentException(done.stderr.strip() or f"mv ended with code {done.exit_code}")
        return self.get_info(new_path)

    def make_dir(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Make a folder and its parents; False if it is there."""
        with told(FileNotFoundException):
            if self._machine.files.exists(_full(path)):
                return False
            self._machine.files.make_dir(_full(path))
        return True

    def watch_dir(
        self, path: str, user: str | None = None, request_timeout: float | None = None, recursive: bool = False
    ) -> WatchHandle:
        """Return a watch on a folder."""
        full = _full(path)
        with told(FileNotFoundException):
            return WatchHandle(self._machine.files.watch(full, depth=RECURSIVE_DEPTH if recursive else 1), full)


def _full(path: str) -> str:
    return posixpath.normpath(posixpath.join(HOME, path))


def _bytes(data: Data) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    if isinstance(data, IO) or hasattr(data, "read"):
        found = data.read()
        return found.encode() if isinstance(found, str) else bytes(found)
    return b"".join(data)


def _entry(info: FileInfo) -> EntryInfo:
    kinds = {"file": FileType.FILE, "dir": FileType.DIR, "symlink": FileType.SYMLINK}
    return EntryInfo(
        name=info.name, type=kinds.get(info.kind), path=info.path, size=info.size, mode=info.mode,
        permissions=stat.filemode(info.mode)[1:], modified_time=datetime.fromtimestamp(info.mtime_s, UTC),
    )  # fmt: skip
