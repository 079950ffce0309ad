"""Files in a machine, whole: read, write, list, stat, remove, make folders, and what changed since the last look.

Paths are the guest's and absolute. A file is at most 64 MiB here; larger things travel by `Machine.exec` and its streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recess.errors import NotFound
from recess.sdk.transport import Transport


@dataclass(frozen=True)
class FileInfo:
    """One file. `kind`: file | dir | symlink | other; `size` in bytes, `mode` the permission bits, `mtime_s` wall seconds."""

    path: str
    kind: str
    size: int
    mode: int
    mtime_s: float

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Change:
    """What became of a path between two looks. `what`: created | changed | removed."""

    what: str
    path: str


class Files:
    """The files of one machine."""

    def __init__(self, transport: Transport, ref: str) -> None:
        self._transport = transport
        self._base = f"/v1/machines/{ref}"

    def read(self, path: str) -> bytes:
        """Return a file's bytes. Raises NotFound, BadInput (a folder, or too large)."""
        return self._transport.raw("GET", f"{self._base}/files", query={"path": path})

    def read_text(self, path: str) -> str:
        """Return a file's text, UTF-8."""
        return self.read(path).decode()

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a whole file by temporary name and rename; its folders are made."""
        body = data.encode() if isinstance(data, str) else data
        self._transport.raw("PUT", f"{self._base}/files", query={"path": path, "mode": f"{mode:o}"}, body=body)

    def stat(self, path: str) -> FileInfo:
        """Return what is there. Raises NotFound."""
        return _info(self._transport.call("GET", f"{self._base}/files/stat", query={"path": path}))

    def exists(self, path: str) -> bool:
        """Tell whether anything is there."""
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def list(self, path: str, *, depth: int = 1) -> list[FileInfo]:
        """Return what is in a folder, sorted by path, and in its folders down to `depth` (at most 32; 10,000 entries)."""
        query = {"path": path, "depth": depth}
        return [_info(one) for one in self._transport.call("GET", f"{self._base}/files/list", query=query)["entries"]]

    def make_dir(self, path: str) -> None:
        """Make a folder and its parents; one that is there is no error."""
        self._transport.raw("PUT", f"{self._base}/folders", query={"path": path})

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or a folder if it is empty or `recursive`; absent is no error."""
        query = {"path": path, "recursive": "1" if recursive else None}
        self._transport.raw("DELETE", f"{self._base}/files", query=query)

    def watch(self, path: str, *, depth: int = 1) -> Watch:
        """Return a watch on a folder that notes what is there now."""
        return Watch(self, path, depth)


class Watch:
    """What changes in a folder, by comparing listings: two changes of one file between two looks are one, and what came
    and went in between is not seen."""

    def __init__(self, files: Files, path: str, depth: int) -> None:
        self._files, self._path, self._depth = files, path, depth
        self._seen = self._look()

    def changes(self) -> list[Change]:
        """Return what changed since the last call, by path."""
        before, self._seen = self._seen, self._look()
        return compare(before, self._seen)

    def _look(self) -> dict[str, FileInfo]:
        return {one.path: one for one in self._files.list(self._path, depth=self._depth)}


def compare(before: Mapping[str, FileInfo], after: Mapping[str, FileInfo]) -> list[Change]:
    """Return the differences of two listings, by path. A folder whose time alone changed is no change of its own."""
    found = []
    for path in sorted({*before, *after}):
        if path not in before:
            found.append(Change("created", path))
        elif path not in after:
            found.append(Change("removed", path))
        elif before[path] != after[path] and not before[path].kind == after[path].kind == "dir":
            found.append(Change("changed", path))
    return found


def _info(data: Mapping[str, Any]) -> FileInfo:
    return FileInfo(str(data["path"]), str(data["kind"]), int(data["size"]), int(data["mode"]), float(data["mtime_s"]))
