"""The fake guest's file system: one tree over two dicts, tmpfs in memory and the rest on the disk. Pure but for `now`."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Callable, Collection, Sequence

from recess.drivers.fake.state import TMPFS, DiskState, FileNode, MemoryState
from recess.errors import BadInput, NotFound, Refused
from recess.guestlink.link import FileStat

LIST_MAX = 10_000


class FileTree:
    """Paths to nodes. Parents are made as needed, as guestd does. `minding`: what is sealed is not written."""

    def __init__(self, memory: MemoryState, disk: DiskState, now: Callable[[], float], *, minding: bool = True) -> None:
        self._memory = memory
        self._disk = disk
        self._now = now
        self._minding = minding

    def seal(self, path: str) -> str:
        """Let nobody but the host write here; return the path by which it does. Raises NotFound."""
        self.stat(path)
        return self._memory.sealed.setdefault(path, f"/run/recess/behind/{len(self._memory.sealed)}")

    def unseal(self, path: str) -> None:
        """Let everybody write here again."""
        self._memory.sealed.pop(path, None)

    def meant(self, path: str) -> tuple[FileTree, str, str]:
        """Return the tree and path that a path of the host's means, and what of it stands for that path's beginning."""
        path = self.clean(path)
        for target, behind in self._memory.sealed.items():
            if path == behind or path.startswith(behind + "/"):
                return (
                    FileTree(self._memory, self._disk, self._now, minding=False),
                    target + path[len(behind) :],
                    behind,
                )
        return self, path, ""

    def _mind(self, path: str) -> None:
        if self._minding and any(path == top or path.startswith(top + "/") for top in self._memory.sealed):
            raise Refused(f"{path}: Read-only file system")

    def _home(self, path: str) -> dict[str, FileNode]:
        in_ram = any(path == top or path.startswith(top + "/") for top in TMPFS)
        return self._memory.files if in_ram else self._disk.files

    @staticmethod
    def clean(path: str, cwd: str = "/") -> str:
        """Return the absolute, normalised path; raises BadInput for NUL or emptiness."""
        if not path or "\0" in path:
            raise BadInput(f"not a path: {path!r}")
        return posixpath.normpath(posixpath.join(cwd, path)).replace("//", "/")

    def get(self, path: str) -> FileNode | None:
        """Return the node or None, symlinks not followed."""
        return self._home(path).get(path)

    def make_dirs(self, path: str) -> None:
        """Make the folder and its parents."""
        node = self.get(path)
        if node is not None:
            if node.kind != "dir":
                raise BadInput(f"not a folder: {path}")
            return
        self._mind(path)
        if path != "/":
            self.make_dirs(posixpath.dirname(path))
        self._home(path)[path] = FileNode("dir", 0o755, self._now())

    def write(self, path: str, data: bytes, mode: int = 0o644, *, mtime_s: float | None = None) -> None:
        """Write a whole file."""
        self._mind(path)
        self.make_dirs(posixpath.dirname(path))
        node = self.get(path)
        if node is not None and node.kind == "dir":
            raise BadInput(f"is a folder: {path}")
        self._home(path)[path] = FileNode("file", mode, self._now() if mtime_s is None else mtime_s, data)

    def append(self, path: str, data: bytes) -> None:
        """Add to the end of a file, made if absent."""
        node = self.get(path)
        self.write(path, (node.data if node else b"") + data, node.mode if node else 0o644)

    def read(self, path: str) -> bytes:
        """Return a file's bytes, one symlink followed; raises NotFound."""
        node = self.get(path)
        if node is not None and node.kind == "symlink":
            node = self.get(self.clean(node.data.decode(), posixpath.dirname(path)))
        if node is None:
            raise NotFound(f"no such file in the machine: {path}", kind="file", ref=path)
        if node.kind == "dir":
            raise BadInput(f"is a folder: {path}")
        return node.data

    def stat(self, path: str) -> FileStat:
        """Return what is there; raises NotFound."""
        node = self.get(path)
        if node is None:
            raise NotFound(f"no such file in the machine: {path}", kind="file", ref=path)
        return FileStat(path, node.kind, len(node.data), node.mode, node.mtime_s)

    def children(self, path: str) -> list[str]:
        """Return the paths directly below a folder, sorted."""
        prefix = path.rstrip("/") + "/"
        names = {**self._memory.files, **self._disk.files}
        return sorted(p for p in names if p.startswith(prefix) and p != "/" and "/" not in p[len(prefix) :])

    def list_dir(self, path: str) -> list[FileStat]:
        """Return at most LIST_MAX entries; raises NotFound or BadInput."""
        if self.stat(path).kind != "dir":
            raise BadInput(f"not a folder: {path}")
        return [self.stat(child) for child in self.children(path)[:LIST_MAX]]

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove; absent is not an error, a full folder without `recursive` is."""
        self._mind(path)
        below = self.children(path)
        if below and not recursive:
            raise BadInput(f"folder is not empty: {path}")
        for child in below:
            self.remove(child, recursive=True)
        self._home(path).pop(path, None)

    def pack(self, path: str, name: str, *, follow: bool = False, skip: Sequence[str] = ()) -> bytes:
        """Return a tar of what is at `path`, called `name` in it; raises NotFound, BadInput (a file without a name)."""
        node = self.get(path)
        if follow and node is not None and node.kind == "symlink":
            path = self.clean(node.data.decode(), posixpath.dirname(path))
        if self.stat(path).kind != "dir" and not name:
            raise BadInput("only a folder can be read without a name")
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            self._pack(tar, path, name, frozenset(skip))
        return out.getvalue()

    def _pack(self, tar: tarfile.TarFile, path: str, name: str, skip: Collection[str]) -> None:
        node = self.get(path)
        if node is None or path in skip:
            return
        member = tarfile.TarInfo(name or ".")
        member.mode, member.mtime = node.mode, int(node.mtime_s)
        if node.kind == "dir":
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
            for child in self.children(path):
                self._pack(tar, child, posixpath.join(name, posixpath.basename(child)), skip)
        elif node.kind == "symlink":
            member.type, member.linkname = tarfile.SYMTYPE, node.data.decode()
            tar.addfile(member)
        else:
            member.size = len(node.data)
            tar.addfile(member, io.BytesIO(node.data))

    def unpack(self, path: str, archive: bytes) -> None:
        """Unpack a tar below `path`; members that would leave it are refused before anything is written."""
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = tar.getmembers()
            for member in members:
                target = self.clean(member.name, path)
                if member.name.startswith("/") or not (target + "/").startswith(path.rstrip("/") + "/"):
                    raise BadInput(f"tar member leaves the folder: {member.name}")
            for member in members:
                target = self.clean(member.name, path)
                if member.isdir():
                    self.make_dirs(target)
                elif member.issym():
                    self._mind(target)
                    self.make_dirs(posixpath.dirname(target))
                    self._home(target)[target] = FileNode("symlink", 0o777, self._now(), member.linkname.encode())
                elif member.isfile():
                    source = tar.extractfile(member)
                    self.write(target, source.read() if source else b"", member.mode, mtime_s=float(int(member.mtime)))
