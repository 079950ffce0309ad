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
from recess.frames.seekable import ReadRange, ReadRanges, Runs, SeekableReader, Sink, stream_seekable
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

    def __init__(
        self, read: ReadRange, size_bytes: int, index_hash: str, kind: bytes, name: str, *,
        read_many: ReadRanges | None = None, at_once: int = 8,
    ) -> None:  # fmt: skip
        own = SeekableReader(read, size_bytes, None, KIND, name, read_many=read_many)
        self.name, self.size_bytes, self._at_once = name, size_bytes, at_once
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

    def _read_runs(self, runs: Runs, sink: Sink) -> None:
        offsets = self.table.raw_offsets
        numbers = [number for first, count in runs for number in range(first, first + count)]
        contents = self._contents(sorted({number // self._group for number in numbers}))
        for number in numbers:
            ours = number // self._group
            base = int(offsets[ours * self._group])
            sink(number, contents[ours][int(offsets[number]) - base : int(offsets[number + 1]) - base])

    def _contents(self, wanted: list[int]) -> dict[int, bytes]:
        """Return frames of our own, every piece of them proven."""
        with self._lock:
            found = {ours: self._kept[ours] for ours in wanted if ours in self._kept}
            for ours in found:
                self._kept.move_to_end(ours)
        missing = np.array([ours for ours in wanted if ours not in found], np.int64)
        for task in self._own.tasks(missing, found.__setitem__):
            task()
        for ours in missing.tolist():
            self._prove(ours, memoryview(found[ours]))
        with self._lock:
            self._kept |= {ours: found[ours] for ours in missing.tolist()}
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return found

    def _prove(self, ours: int, content: memoryview) -> None:
        offsets, first = self.table.raw_offsets, ours * self._group
        base = int(offsets[first])
        for number in range(first, min(first + self._group, self.table.count)):
            _check_content(self, number, content[int(offsets[number]) - base : int(offsets[number + 1]) - base])
