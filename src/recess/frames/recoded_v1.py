"""Version 1 of a recoded file: the content of another file of frames, compressed in another way, under the same name.

A file is named by the hash of its index, which holds the hash of each frame's content (`index_v2`). So it can be stored
again, harder and in larger frames, and still be proven: a recoded file carries the index of the original, byte for byte,
and whatever it unpacks to must have the hashes that this index says. It is itself a seekable file:

    zstd frame *     frame j holds the contents of the original's frames j*g <= i < (j+1)*g, one after the other
    index, kind "RCOD", extra bytes (little-endian): u16 version = 1, u16 zero, u32 g,
                     32 bytes hash of this file's own index, made without extra bytes, the original's index
    seek table

The file's name is no hash of its own bytes, and proves them only as far as they unpack to the right content. The hash of
its own index finds the bit that flipped on a disk before a decoder sees it. It must know no stores and no policies.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
from blake3 import blake3

from recess.errors import Corrupt, Incompatible, Unsupported
from recess.frames.index import decode_index
from recess.frames.index_v2 import encode_index
from recess.frames.pool import WorkPool
from recess.frames.seekable import ReadRange, SeekableReader, Sink, stream_seekable
from recess.frames.table import FrameTable
from recess.frames.zstd import FRAME_RAW_BYTES_MAX

KIND = b"RCOD"
VERSION = 1
_HEAD = struct.Struct("<HHI32s")
_KEPT_BYTES = 8 << 20  # unpacked frames kept: neighbours of the original lie in one of ours


def group_of(reader: SeekableReader, frame_bytes: int) -> int:
    """Return how many frames of the original go into one, for frames of about `frame_bytes` of content."""
    largest = int(reader.table.raw.max()) if reader.table.count else 1
    return max(1, min(frame_bytes, FRAME_RAW_BYTES_MAX) // max(1, largest))


def recode(
    original: SeekableReader,
    *,
    level: int,
    frame_bytes: int,
    go_on: Callable[[], None] = lambda: None,
    pool: WorkPool | None = None,
) -> Iterator[bytes]:
    """Yield the recoded file piece by piece; everything is read from `original`, and verified. `go_on` is called before
    each frame (by the pool's threads if there is one) and may raise to stop. Raises Unsupported (a file of version 1 does
    not prove its content), Corrupt.
    """
    table = original.table
    if table.contents is None:
        raise Unsupported(f"{original.name} was written by a version that cannot prove another coding of it")
    group = group_of(original, frame_bytes)

    def raw_of(number: int) -> bytes:
        go_on()
        found: list[bytes] = []
        first = number * group
        numbers = np.arange(first, min(first + group, table.count))
        for task in original.tasks(numbers, lambda _, raw: found.append(raw)):
            task()
        for i, raw in zip(numbers.tolist(), found, strict=True):
            _check_content(original, i, raw)
        return b"".join(found)

    def extra_of(own: FrameTable) -> bytes:
        return _HEAD.pack(VERSION, 0, group, _own_hash(own)) + original.index

    yield from stream_seekable(KIND, -(-table.count // group), raw_of, extra_of, level=level, pool=pool)


def _own_hash(table: FrameTable) -> bytes:
    return blake3(encode_index(KIND, table, b"")).digest()


def _check_content(original: SeekableReader, number: int, raw: bytes | memoryview) -> None:
    contents = original.table.contents
    if contents is None or blake3(raw).digest() != contents[number].tobytes():
        raise Corrupt(f"{original.name} frame {number}: content does not match its hash", blob=original.name)


class RecodedReader(SeekableReader):
    """A recoded file that looks like its original: the same table, extra bytes, frame numbers and contents.

    `index_hash` (hex) is the original's name. Only `size_bytes` is its own. Safe to share between threads.
    """

    def __init__(self, read: ReadRange, size_bytes: int, index_hash: str, kind: bytes, name: str) -> None:
        own = SeekableReader(read, size_bytes, None, KIND, name)
        self.name, self.size_bytes = name, size_bytes
        if len(own.extra) < _HEAD.size:
            raise self._corrupt("no index of what it was")
        version, zero, group, own_hash = _HEAD.unpack_from(own.extra)
        if version != VERSION:
            reason = f"recoded file version {version}"
            raise Incompatible(f"{name}: {reason} is unknown here", reasons=[reason])
        self.index = own.extra[_HEAD.size :]
        if zero or not group or own.table.contents is None or _own_hash(own.table) != own_hash:
            raise self._corrupt("its own index does not match its hash")
        if blake3(self.index).hexdigest() != index_hash:
            raise self._corrupt("the index it carries does not match its hash")
        self.table, self.extra = decode_index(self.index, kind, name)
        if self.table.contents is None:
            raise self._corrupt("the index it carries proves no content")
        self._own, self._group = own, group
        ends = self.table.raw_offsets[np.minimum(np.arange(own.table.count + 1) * group, self.table.count)]
        if own.table.count != -(-self.table.count // group) or not np.array_equal(np.diff(ends), own.table.raw):
            raise self._corrupt("its frames do not hold what they should")
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def own_table(self) -> FrameTable:
        """The table of its own frames, and the level they were compressed at."""
        return self._own.table

    def _read_run(self, first: int, count: int, sink: Sink) -> None:
        offsets = self.table.raw_offsets
        for number in range(first, first + count):
            ours = number // self._group
            base = int(offsets[ours * self._group])
            content = self._content(ours)
            sink(number, content[int(offsets[number]) - base : int(offsets[number + 1]) - base])

    def _content(self, ours: int) -> bytes:
        """Return a frame of our own, every piece of it proven."""
        with self._lock:
            if ours in self._kept:
                self._kept.move_to_end(ours)
                return self._kept[ours]
        content = self._own.frame(ours)
        view, offsets = memoryview(content), self.table.raw_offsets
        first = ours * self._group
        for number in range(first, min(first + self._group, self.table.count)):
            base = int(offsets[first])
            _check_content(self, number, view[int(offsets[number]) - base : int(offsets[number + 1]) - base])
        with self._lock:
            self._kept[ours] = content
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return content
