"""OCI layers put on top of each other as plain data: one tree of nodes over one file that holds all content.

A layer is a tar archive, plain, gzip or zstd (image-spec/layer.md); `.wh.NAME` takes NAME of the layers below away,
`.wh..wh..opq` everything in its folder. Whoever made it may be hostile: nothing is unpacked into a file system, names are
resolved inside the tree (".." and links cannot leave it), devices are refused outside of dev/ (a machine has its own), what
is decompressed is bounded, and so are the entries. This module must know nothing of registries or image names.
"""

from __future__ import annotations

import stat
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from recess.errors import BadInput, Corrupt
from recess.images.tree import Node, node_of, with_parents
from recess.units import GIB, MIB, format_bytes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROOT_BYTES_MAX = 32 * GIB
ENTRIES_MAX = 2_000_000
LAYERS_MAX = 512
LINKS_MAX = 40
_PIECE = 1 * MIB
_HEADER_BYTES_MAX = 1 * MIB  # of one member: names, link, extended attributes
_WINDOW_LOG_MAX = 27  # 128 MiB: what `zstd --long` asks for
_GZIP = 31  # zlib: a gzip header, the largest window
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_KEPT_XATTRS = ("user.", "security.")  # not trusted.*: overlayfs would take orders from them


class _Decoder(Protocol):
    """What turns compressed bytes into raw ones, at most so many at a time."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what comes of these bytes."""
        ...

    def end(self) -> None:
        """Raise Corrupt unless the stream is complete."""
        ...


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def end(self) -> None:
        return


class _Gzip:
    """gzip, several members behind each other too."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(_GZIP)
        self._fresh = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                self._fresh = False
                yield self._inflate.decompress(data, _PIECE)
                data = self._inflate.unconsumed_tail
                if self._inflate.eof:
                    data = self._inflate.unused_data.lstrip(b"\0")  # padding is allowed behind the last member
                    self._inflate, self._fresh = zlib.decompressobj(_GZIP), True
        except zlib.error as exc:
            raise Corrupt(f"a layer is damaged gzip: {exc}") from exc

    def end(self) -> None:
        if not self._fresh:
            raise Corrupt("a layer breaks off in the middle of its gzip stream")


class _Zstd:
    """zstd, several frames behind each other too."""

    def __init__(self) -> None:
        self._options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
        self._decoder = zstd.ZstdDecompressor(options=self._options)
        self._fresh = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            while data or not (self._fresh or self._decoder.needs_input or self._decoder.eof):
                self._fresh = False
                yield self._decoder.decompress(data, _PIECE)
                data = b""
                if self._decoder.eof:
                    data = self._decoder.unused_data
                    self._decoder, self._fresh = zstd.ZstdDecompressor(options=self._options), True
        except zstd.ZstdError as exc:
            raise Corrupt(f"a layer is damaged zstd: {exc}") from exc

    def end(self) -> None:
        if not self._fresh:
            raise Corrupt("a layer breaks off in the middle of its zstd stream")


def append_layer(blob: BinaryIO, out: BinaryIO, *, limit: int = ROOT_BYTES_MAX) -> int:
    """Decompress a layer to the end of `out` and return where it begins there. Raises Corrupt (damaged, or `out` would
    become larger than `limit`); OSError as the disk has it."""
    first = blob.read(_PIECE)
    decoder: _Decoder = _Plain()
    if first.startswith(_GZIP_MAGIC):
        decoder = _Gzip()
    elif first.startswith(_ZSTD_MAGIC):
        decoder = _Zstd()
    begin = total = out.seek(0, 2)
    piece = first
    while piece:
        for raw in decoder.feed(piece):
            total += len(raw)
            if total > limit:
                raise Corrupt(f"the image's layers hold more than {format_bytes(limit)}")
            out.write(raw)
        piece = blob.read(_PIECE)
    decoder.end()
    return begin


@dataclass(frozen=True)
class _Held:
    """A node and the inode it is: names that share one are hard links."""

    node: Node
    inode: int


class _Headers:
    """A file of which tarfile may read headers: it takes what a member says of itself into memory, however long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Read. Raises Corrupt for more than any header has."""
        if not 0 <= size <= _HEADER_BYTES_MAX:
            raise Corrupt("a layer holds a header that is too long")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()


class Tree:
    """The layers so far, by path. `add` the next one, `nodes` at the end."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {"": _Held(Node("", stat.S_IFDIR | 0o755), 0)}
        self._children: dict[str, set[str]] = {"": set()}
        self._inodes = 0

    def add(self, archive: Path, begin: int) -> None:
        """Put the layer on top that begins at this offset. Raises Corrupt for a hostile or damaged archive."""
        mine: set[str] = set()  # what this layer brought: its whiteouts do not touch that
        try:
            with archive.open("rb") as file:
                file.seek(begin)
                with tarfile.open(fileobj=cast("BinaryIO", _Headers(file)), mode="r:") as tar:
                    for count, member in enumerate(tar):
                        if count > ENTRIES_MAX or self._inodes > ENTRIES_MAX:
                            raise Corrupt(f"the image has more than {ENTRIES_MAX} entries")
                        self._member(member, mine)
                        cast("Any", tar).members = []  # tarfile would keep every one
        except (tarfile.TarError, EOFError, UnicodeError, ValueError) as exc:
            raise Corrupt(f"a layer cannot be read: {exc}") from exc

    def _member(self, member: tarfile.TarInfo, mine: set[str]) -> None:
        node = node_of(member)
        folder, _, name = node.path.rpartition("/")
        if name == _OPAQUE:
            for path in list(self._children.get(self._folder(folder, member.name, make=False) or "?", ())):
                if path not in mine:
                    self._remove(path, mine)
        elif name.startswith(_WHITEOUT):
            home = self._folder(folder, member.name, make=False)
            path = _join(home or "", name.removeprefix(_WHITEOUT))
            if home is not None and path in self._held and path not in mine:
                self._remove(path, mine)
        else:
            self._put(node, member.name, mine)

    def _put(self, node: Node, said: str, mine: set[str]) -> None:
        folder, _, name = node.path.rpartition("/")
        if not node.path:  # the root folder itself
            self._held[""] = replace(self._held[""], node=node) if stat.S_ISDIR(node.mode) else self._held[""]
            return
        home = self._folder(folder, said, make=True) or ""
        path = _join(home, name)
        if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
            if path.startswith("dev/"):
                return  # a machine has its own
            raise Corrupt(f"the image holds a device: {said!r}")
        held = self._hard_link(node, said) if node.hardlink_to else self._fresh(node)
        there = self._held.get(path)
        if there is not None and not (stat.S_ISDIR(there.node.mode) and stat.S_ISDIR(held.node.mode)):
            self._remove(path, mine)
        kept = {key: value for key, value in held.node.xattrs.items() if key.startswith(_KEPT_XATTRS)}
        self._held[path] = _Held(replace(held.node, path=path, xattrs=kept), held.inode)
        self._children[home].add(path)
        if stat.S_ISDIR(held.node.mode):
            self._children.setdefault(path, set())
        mine.add(path)

    def _fresh(self, node: Node) -> _Held:
        self._inodes += 1
        return _Held(node, self._inodes)

    def _hard_link(self, node: Node, said: str) -> _Held:
        parts = node.hardlink_to.split("/")
        folder = self._folder("/".join(parts[:-1]), said, make=False) if ".." not in parts else None
        target = self._held.get(_join(folder, parts[-1])) if folder is not None else None
        if target is None or stat.S_ISDIR(target.node.mode):
            raise Corrupt(f"a hard link leads nowhere: {said!r}")
        return target

    def _folder(self, path: str, said: str, *, make: bool) -> str | None:
        """Return the real path of a folder, links followed inside the tree; None if it is not there, without `make`."""
        here, todo, links = "", [part for part in reversed(path.split("/")) if part], 0
        while todo:
            part = todo.pop()
            if part == "..":
                here = here.rpartition("/")[0]
                continue
            step = _join(here, part)
            held = self._held.get(step)
            if held is None:
                if not make:
                    return None
                held = self._fresh(Node(step, stat.S_IFDIR | 0o755))
                self._held[step], self._children[step] = held, set()
                self._children[here].add(step)
            if stat.S_ISLNK(held.node.mode):
                links += 1
                target = (held.node.data or b"").decode("utf-8", "surrogateescape")
                if links > LINKS_MAX:
                    raise Corrupt(f"links go round in circles: {said!r}")
                here = "" if target.startswith("/") else here
                todo += [word for word in reversed(target.split("/")) if word not in ("", ".")]
            elif stat.S_ISDIR(held.node.mode):
                here = step
            else:
                raise Corrupt(f"{said!r} lies below something that is no folder")
        return here

    def _remove(self, path: str, mine: set[str]) -> None:
        doomed = [path]
        while doomed:
            gone = doomed.pop()
            doomed += self._children.pop(gone, ())
            del self._held[gone]
            mine.discard(gone)
        self._children[path.rpartition("/")[0]].discard(path)

    def nodes(self) -> dict[str, Node]:
        """Return the tree: of several names for one inode the first holds it, the others are hard links to that."""
        first: dict[int, str] = {}
        out: dict[str, Node] = {}
        for path in sorted(self._held):
            held = self._held[path]
            home = first.setdefault(held.inode, path)
            out[path] = held.node if home == path else Node(path, 0, hardlink_to=home)
        return with_parents(out)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def check_count(layers: int) -> None:
    """Refuse an image of more layers than any builder makes. Raises BadInput."""
    if layers > LAYERS_MAX:
        raise BadInput(f"the image has {layers} layers, at most {LAYERS_MAX} are taken")
