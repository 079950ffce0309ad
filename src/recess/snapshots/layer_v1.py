"""Version 1 of a layer: packed 4 KiB pages in frames, and an index of whose pages they were.

A slot is the place of one page; slot s is page s % k of frame s // k, with k pages in a frame (the last may be short).
Extra bytes of the index (little-endian): u16 version = 1, u16 zero, u32 page bytes = 4096, u32 pages in a frame k,
u32 slots, u32 parts, then for each part: u16 size of its name, u16 zero, u32 runs r, name, u32 first page[r],
u32 pages[r]. Slots are counted through parts and runs in this order: that maps each page to its slot.

All parts of a snapshot share one layer: one fsync less, and a page that is both in memory and on the disk is one slot.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from recess.errors import Corrupt, Incompatible
from recess.frames import FRAME_RAW_BYTES_MAX, SeekableFile, SeekableReader, WorkPool, build_seekable
from recess.snapshots.contract import PageData
from recess.snapshots.pagemap import expand
from recess.units import PAGE_BYTES

KIND = b"LAYR"
VERSION = 1
SLOTS_MAX = 1 << 28
_PARTS_MAX = 64
_NAME_MAX = 64
_HEAD = struct.Struct("<HHIIII")
_PART = struct.Struct("<HHI")

Visit = Callable[[int, int, PageData], None]  # (low, high, pages): the pages of the entries low <= i < high


def build_layer(
    owners: Sequence[tuple[str, NDArray[np.uint32]]],
    pages_of: Callable[[int, int], PageData],
    *,
    frame_bytes: int,
    level: int,
    pool: WorkPool,
    write: Callable[[bytes], None] | None = None,
    ahead: int | None = None,
) -> SeekableFile:
    """Return the layer of these pages. `owners`: per part its name and ascending page numbers, in slot order.

    `pages_of(low, high)` returns the content of slots low <= s < high; called once per frame, from several threads. `write`, `ahead`:
    see `build_seekable`.
    """
    per_frame = frame_bytes // PAGE_BYTES
    slots = sum(len(pages) for _, pages in owners)
    count = -(-slots // per_frame)

    def raw_of(frame: int) -> memoryview:
        pages = pages_of(frame * per_frame, min((frame + 1) * per_frame, slots))
        return np.ascontiguousarray(pages).data.cast("B")

    extra = _encode_extra(owners, per_frame, slots)
    return build_seekable(KIND, count, raw_of, extra, level=level, pool=pool, write=write, ahead=ahead)


def _encode_extra(owners: Sequence[tuple[str, NDArray[np.uint32]]], per_frame: int, slots: int) -> bytes:
    out = [_HEAD.pack(VERSION, 0, PAGE_BYTES, per_frame, slots, len(owners))]
    for name, pages in owners:
        cuts = np.flatnonzero(np.diff(pages.astype(np.int64)) != 1) + 1
        starts = np.concatenate(([0], cuts)) if len(pages) else np.empty(0, np.int64)
        counts = np.diff(starts, append=len(pages))
        encoded = name.encode()
        out.append(_PART.pack(len(encoded), 0, len(starts)) + encoded)
        out.append(pages[starts].astype("<u4").tobytes() + counts.astype("<u4").tobytes())
    return b"".join(out)


class LayerReader:
    """Random access to the pages of one layer. Safe to share between threads. Raises Corrupt, Incompatible."""

    def __init__(self, file: SeekableReader) -> None:
        self._file = file
        self.name = file.name
        self.slots, self._per_frame, self._at = self._decode_head(self._file.extra)

    def _corrupt(self, why: str) -> Corrupt:
        return Corrupt(f"{self.name}: {why}", blob=self.name)

    def _decode_head(self, extra: bytes) -> tuple[int, int, int]:
        if len(extra) < _HEAD.size:
            raise self._corrupt("no layer index")
        version, zero, page_bytes, per_frame, slots, parts = _HEAD.unpack_from(extra)
        if version != VERSION:
            raise Incompatible(
                f"{self.name}: layer version {version} is unknown here", reasons=[f"layer version {version}"]
            )
        sane = 1 <= per_frame <= FRAME_RAW_BYTES_MAX // PAGE_BYTES and slots <= SLOTS_MAX and parts <= _PARTS_MAX
        if zero or page_bytes != PAGE_BYTES or not sane:
            raise self._corrupt("layer header makes no sense")
        if -(-slots // per_frame) != self._file.table.count:  # before anything is made for so many slots
            raise self._corrupt("frames do not hold the slots they should")
        raw = self._file.table.raw.astype(np.int64)
        full = np.full(-(-slots // per_frame), per_frame * PAGE_BYTES, np.int64)
        if len(full):
            full[-1] = (slots - per_frame * (len(full) - 1)) * PAGE_BYTES
        if not np.array_equal(raw, full):
            raise self._corrupt("frames do not hold the slots they should")
        return slots, per_frame, _HEAD.size

    def owners(self) -> list[tuple[str, NDArray[np.uint32]]]:
        """Return per part its name and page numbers in slot order: what the layer was made of. Raises Corrupt."""
        extra, at, total = self._file.extra, self._at, 0
        found: list[tuple[str, NDArray[np.uint32]]] = []
        parts = _HEAD.unpack_from(extra)[5]
        for _ in range(parts):
            if len(extra) < at + _PART.size:
                raise self._corrupt("layer index is cut short")
            name_bytes, zero, runs = _PART.unpack_from(extra, at)
            at += _PART.size
            if zero or name_bytes > _NAME_MAX or len(extra) < at + name_bytes + 8 * runs:
                raise self._corrupt("layer index is cut short")
            name = extra[at : at + name_bytes].decode("utf-8", "replace")
            at += name_bytes
            starts = np.frombuffer(extra, "<u4", runs, at).astype(np.int64)
            counts = np.frombuffer(extra, "<u4", runs, at + 4 * runs).astype(np.int64)
            at += 8 * runs
            total += int(counts.sum())
            if total > self.slots or (counts < 1).any() or (starts[1:] < (starts + counts)[:-1]).any():
                raise self._corrupt("layer index has runs that overlap or are too long")
            found.append((name, expand(starts, counts).astype(np.uint32)))
        if at != len(extra) or total != self.slots:
            raise self._corrupt("layer index does not name every slot")
        return found

    @property
    def pages_per_frame(self) -> int:
        """How many pages a frame holds; the last one may hold fewer."""
        return self._per_frame

    def frame(self, number: int) -> PageData:
        """Return the verified pages of one frame, in slot order. Raises Corrupt."""
        return np.frombuffer(self._file.frame(number), np.uint8).reshape(-1, PAGE_BYTES)

    def frames(self, numbers: Sequence[int]) -> dict[int, PageData]:
        """Return the verified pages of several frames (ascending, no doubles), read together. Raises Corrupt."""
        found: dict[int, PageData] = {}

        def sink(number: int, raw: bytes) -> None:
            found[number] = np.frombuffer(raw, np.uint8).reshape(-1, PAGE_BYTES)

        for task in self._file.tasks(np.array(numbers, np.int64), sink):
            task()
        return found

    @property
    def frame_count(self) -> int:
        """How many frames there are."""
        return self._file.table.count

    def frame_span(self, number: int) -> tuple[int, int]:
        """Return where a frame lies in the file as it was written: offset and length, in bytes."""
        return int(self._file.table.offsets[number]), self.frame_bytes(number)

    def frames_within(self, number: int, size: int) -> range:
        """Return the frames that lie in the same stretch of the file: of `size` bytes, aligned to them."""
        starts = self._file.table.offsets[:-1]
        low = int(starts[number]) // size * size
        return range(*(int(np.searchsorted(starts, at)) for at in (low, low + size)))

    def frame_bytes(self, number: int) -> int:
        """Return how many stored bytes a frame has."""
        return int(self._file.table.compressed[number])

    def frames_of(self, slots: NDArray[np.int64]) -> int:
        """Return how many frames hold these slots."""
        return len(np.unique(slots // self._per_frame))

    def visits(self, slots: NDArray[np.int64], visit: Visit) -> list[Callable[[], None]]:
        """Return tasks that together hand the page of every entry of `slots` (ascending, doubles allowed) to `visit`.

        Each frame is read, verified and decoded once; tasks are independent, so a pool may run them. Raises Corrupt
        at once if a slot is not there.
        """
        if not len(slots):
            return []
        if not 0 <= int(slots[0]) <= int(slots[-1]) < self.slots:
            raise self._corrupt(f"no slot {int(slots[-1])}")
        per_frame = self._per_frame
        frames, lows = np.unique(slots // per_frame, return_index=True)
        bounds = dict(
            zip(frames.tolist(), zip(lows.tolist(), [*lows[1:].tolist(), len(slots)], strict=True), strict=True)
        )

        def sink(frame: int, raw: bytes) -> None:
            low, high = bounds[frame]
            pages = np.frombuffer(raw, np.uint8).reshape(-1, PAGE_BYTES)
            inside = slots[low:high] - frame * per_frame
            first = int(inside[0])
            if int(inside[-1]) - first + 1 == high - low and (np.diff(inside) == 1).all():
                visit(low, high, pages[first : first + high - low])  # neighbours: no copy
            else:
                visit(low, high, pages[inside])

        return self._file.tasks(frames, sink)

    def verify(self, pool: WorkPool) -> int:
        """Read and check every frame and the whole index; return the size in bytes."""
        self.owners()
        pool.each([partial(task) for task in self._file.tasks(np.arange(self._file.table.count), lambda *_: None)])
        return self._file.size_bytes
