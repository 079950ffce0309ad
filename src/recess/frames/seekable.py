"""A file in the Zstandard Seekable Format: write it in one go, read any frame of it by ranged reads.

    zstd frame *            independent frames, one after the other
    skippable 0x184D2A5D    our index (index_v2): sizes, hashes, extra bytes of the user
    skippable 0x184D2A5E    the standard seek table, last in the file; its footer ends with 0x8F92EAB1

(Format: zstd's contrib/seekable_format, version 0.1.0; no checksums in the seek table.) `zstd -d` skips both skippable
frames and unpacks the rest; other seekable readers find their table, where our index is an entry without content.

The file's name is the hash of its index. A reader is given that hash, and so trusts no byte: the index is checked
against it, the seek table must be the very one the index implies, and each frame is checked when it is read.

Used by snapshots (layers, page maps) and by the context log (segments). It must know neither of them.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from recess.errors import Corrupt
from recess.frames.index import decode_index
from recess.frames.index_v2 import encode_index
from recess.frames.pool import WorkPool
from recess.frames.table import FRAMES_MAX, INDEX_BYTES_MAX, FrameTable, table_of
from recess.frames.zstd import Bytes, Frame, FrameEncoder, decode_frame

INDEX_MAGIC = 0x184D2A5D
SEEK_TABLE_MAGIC = 0x184D2A5E
SEEKABLE_MAGIC = 0x8F92EAB1
_SKIPPABLE = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_TAIL_BYTES = 64 * 1024  # the first read: enough for index and seek table of a layer of 90 MB
_BATCH_FRAMES = 8  # frames per task: long enough to hide the cost of a task, short enough to share the work

ReadRange = Callable[[int, int], bytes]  # (offset, length) -> exactly that many bytes, or Corrupt
ReadRanges = Callable[[Sequence[tuple[int, int]]], list[bytes]]  # many of them at once
Runs = Sequence[tuple[int, int]]  # (first frame, count) each
Sink = Callable[[int, bytes], None]  # (frame number, verified content); called from several threads


@dataclass(frozen=True)
class SeekableFile:
    """A whole file: its pieces in order, if they were not written while it was made. `index_hash` (hex) names it."""

    index_hash: str
    pieces: list[bytes]
    size_bytes: int
    table: FrameTable


def build_seekable(
    kind: bytes,
    count: int,
    raw_of: Callable[[int], Bytes],
    extra: bytes,
    *,
    level: int,
    pool: WorkPool,
    write: Callable[[bytes], None] | None = None,
    ahead: int | None = None,
) -> SeekableFile:
    """Compress `count` frames in parallel and put the file together.

    `raw_of(i)` returns the content of frame i; it is called once for each, from the pool's threads, so it may do the
    gathering of scattered pages there. `write` gets the pieces in order while the next are being made, in the caller's
    thread; the file returned has none then. `ahead`: see `WorkPool.in_order`; batches of 8 frames.
    """

    def encode(start: int) -> list[Frame]:
        encoder = FrameEncoder(level)
        return [encoder.encode(raw_of(i)) for i in range(start, min(start + _BATCH_FRAMES, count))]

    held: list[bytes] = []
    out = held.append if write is None else write
    frames = []
    tasks = [partial(encode, start) for start in range(0, count, _BATCH_FRAMES)]
    with contextlib.closing(pool.in_order(tasks, ahead=ahead)) as batches:
        for frame in itertools.chain.from_iterable(batches):
            out(frame.data)
            frames.append(frame.without_data())
    table = table_of(frames, level=level)
    index = encode_index(kind, table, extra)
    tail = encode_tail(table, index)
    out(tail)
    size = sum(frame.stored_bytes for frame in frames) + len(tail)
    return SeekableFile(blake3(index).hexdigest(), held, size, table)


def stream_seekable(
    kind: bytes,
    count: int,
    raw_of: Callable[[int], Bytes],
    extra_of: Callable[[FrameTable], bytes],
    *,
    level: int,
    pool: WorkPool | None = None,
) -> Iterator[bytes]:
    """Yield a file piece by piece as it is compressed, in the memory of one frame (and of the table): by the caller's
    thread, or by all of a pool, in the memory of a frame each."""
    frames = []
    for frame in _encoded(count, raw_of, level, pool):
        frames.append(frame.without_data())
        yield frame.data
    table = table_of(frames, level=level)
    yield encode_tail(table, encode_index(kind, table, extra_of(table)))


def _encoded(count: int, raw_of: Callable[[int], Bytes], level: int, pool: WorkPool | None) -> Iterator[Frame]:
    if pool is None:
        encoder = FrameEncoder(level)
        yield from (encoder.encode(raw_of(number)) for number in range(count))
        return
    for low in range(0, count, pool.threads):  # no more at a time: what is ahead of the writer is memory
        tasks = [partial(_encode, raw_of, number, level) for number in range(low, min(low + pool.threads, count))]
        yield from pool.in_order(tasks)


def _encode(raw_of: Callable[[int], Bytes], number: int, level: int) -> Frame:
    return FrameEncoder(level).encode(raw_of(number))


def encode_tail(table: FrameTable, index: bytes) -> bytes:
    """Return what follows the frames: the index and the standard seek table, both skippable."""
    return _SKIPPABLE.pack(INDEX_MAGIC, len(index)) + index + encode_seek_table(table, len(index))


def encode_seek_table(table: FrameTable, index_bytes: int) -> bytes:
    """Return the standard seek table that follows an index of this many bytes."""
    entries = np.zeros((table.count + 1, 2), "<u4")
    entries[:-1, 0] = table.compressed
    entries[:-1, 1] = table.raw
    entries[-1, 0] = _SKIPPABLE.size + index_bytes
    footer = _FOOTER.pack(table.count + 1, 0, SEEKABLE_MAGIC)
    return _SKIPPABLE.pack(SEEK_TABLE_MAGIC, entries.nbytes + len(footer)) + entries.tobytes() + footer


class SeekableReader:
    """Random access to the frames of one file. Immutable after construction, so safe to share between threads.

    `read` fetches a range of the file, `size_bytes` is its size, `index_hash` (hex) its name, `name` is for messages.
    Raises Corrupt or Incompatible at once if the file is not what the hash names. Without a hash the file is only
    consistent in itself: for those whose content is proven in another way (`recoded_v1`). `read_many` fetches ranges
    together, at best by one request, and `at_once` is how many frames of one task are fetched so: more for a file afar.
    """

    def __init__(
        self, read: ReadRange, size_bytes: int, index_hash: str | None, kind: bytes, name: str, *,
        read_many: ReadRanges | None = None, at_once: int = _BATCH_FRAMES,
    ) -> None:  # fmt: skip
        self.name = name
        self._read_many = read_many or (lambda ranges: [read(*one) for one in ranges])
        self._at_once = at_once
        tail = read(max(0, size_bytes - _TAIL_BYTES), min(size_bytes, _TAIL_BYTES))
        index_bytes, seek_bytes = self._locate(tail, size_bytes)
        start = size_bytes - seek_bytes - index_bytes - _SKIPPABLE.size
        if start < size_bytes - len(tail):
            tail = read(start, size_bytes - start)
        tail = tail[len(tail) - (size_bytes - start) :]
        index = tail[_SKIPPABLE.size : _SKIPPABLE.size + index_bytes]
        if index_hash is not None and blake3(index).hexdigest() != index_hash:
            raise self._corrupt("index does not match its hash")
        self.table, self.extra = decode_index(index, kind, name)
        self.index = index
        self.size_bytes = size_bytes
        head = _SKIPPABLE.pack(INDEX_MAGIC, index_bytes)
        if tail != head + index + encode_seek_table(self.table, index_bytes):
            raise self._corrupt("seek table does not match the index")
        if int(self.table.offsets[-1]) != start:
            raise self._corrupt("frames do not fill the file")

    def _corrupt(self, why: str) -> Corrupt:
        return Corrupt(f"{self.name}: {why}", blob=self.name)

    def _locate(self, tail: bytes, size_bytes: int) -> tuple[int, int]:
        """Return the sizes of index and seek table, as far as the unverified footer says; both fit the file."""
        if len(tail) < _FOOTER.size + 8:
            raise self._corrupt("too short")
        count, descriptor, magic = _FOOTER.unpack(tail[-_FOOTER.size :])
        seek_bytes = _SKIPPABLE.size + 8 * count + _FOOTER.size
        if magic != SEEKABLE_MAGIC or descriptor != 0 or not 1 <= count <= FRAMES_MAX + 1 or seek_bytes > size_bytes:
            raise self._corrupt("no seek table at its end")
        entry_at = len(tail) - _FOOTER.size - 8
        framed, _ = struct.unpack_from("<II", tail, entry_at)
        index_bytes = framed - _SKIPPABLE.size
        if not 0 <= index_bytes <= min(INDEX_BYTES_MAX, size_bytes - seek_bytes - _SKIPPABLE.size):
            raise self._corrupt("no index before its seek table")
        return index_bytes, seek_bytes

    def frame(self, number: int) -> bytes:
        """Return the verified content of one frame. Raises Corrupt if it is not there."""
        self._check(np.array([number]))
        found: list[bytes] = []
        self._read_runs([(number, 1)], lambda _, raw: found.append(raw))
        return found[0]

    def tasks(self, numbers: NDArray[np.int64], sink: Sink) -> list[Callable[[], None]]:
        """Return independent tasks that read these frames (ascending, no doubles), verify and decode them, and hand
        each to `sink`. Raises Corrupt at once if one is not there."""
        self._check(numbers)
        return [partial(self._read_runs, runs, sink) for runs in _batches(numbers, self._at_once)]

    def frames(self, numbers: NDArray[np.int64], sink: Sink, pool: WorkPool) -> None:
        """Read these frames in parallel; see `tasks`."""
        pool.each(self.tasks(numbers, sink))

    def raw(self, pool: WorkPool, *, max_bytes: int) -> bytes:
        """Return the whole unpacked content. Raises Corrupt beyond `max_bytes`, before anything is read."""
        if int(self.table.raw_offsets[-1]) > max_bytes:
            raise self._corrupt(f"content is over {max_bytes} bytes")
        found: dict[int, bytes] = {}
        self.frames(np.arange(self.table.count), found.__setitem__, pool)
        return b"".join(found[i] for i in range(self.table.count))

    def _check(self, numbers: NDArray[np.int64]) -> None:
        if len(numbers) and not 0 <= int(numbers[0]) <= int(numbers[-1]) < self.table.count:
            raise self._corrupt(f"no frame {int(numbers[-1])}")

    def _read_runs(self, runs: Runs, sink: Sink) -> None:
        """Read runs of neighbouring frames together, before any of it is handed out."""
        offsets, raw = self.table.offsets, self.table.raw
        spans = [(int(offsets[first]), int(offsets[first + count] - offsets[first])) for first, count in runs]
        for (first, count), (base, _), found in zip(runs, spans, self._read_many(spans), strict=True):
            data = memoryview(found)
            for number in range(first, first + count):
                part = data[int(offsets[number]) - base : int(offsets[number + 1]) - base]
                expected = self.table.hashes[number].tobytes()
                sink(number, decode_frame(part, int(raw[number]), expected, f"{self.name} frame {number}"))


def _batches(numbers: NDArray[np.int64], at_once: int) -> Iterator[list[tuple[int, int]]]:
    """Yield ascending numbers as runs (first, count) of neighbours, so many numbers together at most."""
    array = np.asarray(numbers, np.int64)
    for low in range(0, len(array), at_once):
        batch = array[low : low + at_once]
        firsts = np.flatnonzero(np.diff(batch, prepend=batch[0] - 2) != 1)
        counts = np.diff(firsts, append=len(batch))
        yield list(zip(batch[firsts].tolist(), counts.tolist(), strict=True))
