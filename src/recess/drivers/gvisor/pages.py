"""An image's files as the contract's pages, and back.

gVisor writes `pages.img` (4 KiB pages of its memory, in an order that shifts from one image to the next),
`pages_meta.img` and `checkpoint.img` (its own objects). The store compares by page number, so the pages are given
numbers of our own: a page that was known before (in the template, in what the machine was restored from, in the last
capture) keeps the number it had there, equal pages share one, zeros need none, and what is new gets a free one. The
list of numbers, in the file's order, goes into the device state with the two small files. So an unchanged page is
seen to be unchanged however far it has moved.

Form of the device state, all numbers u32 little endian: magic, count of pages, length of `checkpoint.img`, length of
`pages_meta.img`; then the list of numbers; then the two files. A number of 0xFFFFFFFF means a page of zeros.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recess.errors import Corrupt, OutOfSpace
from recess.frames import WorkPool
from recess.machines.contract import PageSet
from recess.snapshots.classify import fingerprints, first_equal
from recess.units import PAGE_BYTES

Pages = NDArray[np.uint8]  # rows of 4096
Numbers = NDArray[np.uint32]

PAGES, META, OBJECTS = "pages.img", "pages_meta.img", "checkpoint.img"
ZERO = 0xFFFFFFFF
_MAGIC = b"RGV1"
_HEAD = struct.Struct("<4sIII")
_FILE_BYTES_MAX = 1 << 30
# A file's pages for each number: equal pages share one, and zeros have none, so there may be more of them. Bounded, because
# four bytes of a device state become a page of shared memory at a restore.
_SHARE_MAX = 4
_BATCH = 1024

_POOL = WorkPool(name="gvisor-pages")


@dataclass(frozen=True)
class Known:
    """Pages that have numbers already: fingerprints, ascending and each once, and the number of each."""

    prints: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    numbers: Numbers = field(default_factory=lambda: np.empty(0, np.uint32))

    @classmethod
    def of(cls, prints: NDArray[np.uint64], numbers: Numbers) -> Known:
        """Return pages by fingerprint and number, in any order; of equal fingerprints one is kept."""
        unique, first = np.unique(prints, return_index=True)
        return cls(unique, numbers[first])

    def save(self, path: Path) -> None:
        """Keep it for the next server, in one step."""
        aside = path.with_suffix(".new")
        with aside.open("wb") as out:
            np.savez(out, prints=self.prints, numbers=self.numbers)
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Known:
        """Return what was kept; nothing if it is not there or not whole: then the next capture is a whole one."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
                return cls.of(kept["prints"].astype(np.uint64), kept["numbers"].astype(np.uint32))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return cls()


@dataclass(frozen=True)
class Assigned:
    """The number of every page (ZERO for zeros), and the rows that carry the content of each number used, ascending by
    number; `known` is what the next capture goes by."""

    numbers: Numbers
    rows: NDArray[np.int64]
    known: Known


def assign(pages: Pages, known: Known, total: int) -> Assigned:
    """Give every page a number. `total` is how many numbers there are. Pages with one number are equal byte for byte; fingerprints only propose.
    Raises OutOfSpace when there are more different pages than numbers, or very many pages.
    """
    if len(pages) > _SHARE_MAX * total:
        raise _too_much(len(pages), total)
    filled = np.flatnonzero(pages.view(np.uint64).any(axis=1))
    same = first_equal([(pages, filled)], _POOL)
    unique = np.flatnonzero(same == np.arange(len(same)))
    if len(unique) > total:
        raise _too_much(len(unique), total)
    prints = fingerprints(pages, filled[unique], _POOL)
    chosen = _numbers_for(prints, known, total)
    of_entry = np.zeros(len(filled), np.uint32)
    of_entry[unique] = chosen
    numbers = np.full(len(pages), ZERO, np.uint32)
    numbers[filled] = of_entry[same]
    order = np.argsort(chosen)
    return Assigned(numbers, filled[unique[order]], Known.of(prints, chosen))


def _too_much(pages: int, total: int) -> OutOfSpace:
    used, has = (count * PAGE_BYTES >> 20 for count in (pages, total))
    return OutOfSpace(f"the machine uses {used} MiB, the machine has {has}", hint="give the machine more memory")


def _numbers_for(prints: NDArray[np.uint64], known: Known, total: int) -> Numbers:
    chosen = np.full(len(prints), ZERO, np.uint32)
    if len(known.prints):
        at = np.minimum(np.searchsorted(known.prints, prints), len(known.prints) - 1)
        hit = np.flatnonzero((known.prints[at] == prints) & (known.numbers[at] < total))
        _, first = np.unique(known.numbers[at[hit]], return_index=True)  # two that collide cannot both have it
        chosen[hit[first]] = known.numbers[at[hit[first]]]
    taken = np.zeros(total, bool)
    taken[chosen[chosen != ZERO]] = True
    spoken_for = taken.copy()
    spoken_for[known.numbers[known.numbers < total]] = True
    wanted = np.flatnonzero(chosen == ZERO)
    # Numbers nobody knows first: a page that comes back later finds its old number free.
    free = np.concatenate([np.flatnonzero(~spoken_for), np.flatnonzero(spoken_for & ~taken)])
    chosen[wanted] = free[: len(wanted)]
    return chosen


def differing(pages: Pages, assigned: Assigned, base: Pages | None) -> PageSet:
    """Return the pages, in the order of their numbers, that are not equal to `base`'s of that number."""
    numbers, rows = assigned.numbers, assigned.rows
    if base is not None:
        keep = np.ones(len(rows), bool)
        words, base_words = pages.view(np.uint64), base.view(np.uint64)
        for low in range(0, len(rows), _BATCH):
            part = rows[low : low + _BATCH]
            keep[low : low + _BATCH] = (words[part] != base_words[numbers[part]]).any(axis=1)
        rows = rows[keep]
    index = np.ascontiguousarray(numbers[rows], "<u4")
    data = np.ascontiguousarray(pages[rows])
    return PageSet(_view(index), _view(data))


def _view(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")  # an empty array's view cannot be cast


def load(folder: Path) -> Pages:
    """Return an image's pages. Raises Corrupt."""
    data = np.fromfile(folder / PAGES, np.uint8)
    if len(data) % PAGE_BYTES:
        raise Corrupt(f"{PAGES} has {len(data)} bytes, not whole pages")
    return data.reshape(-1, PAGE_BYTES)


def pack_state(folder: Path, numbers: Numbers) -> bytes:
    """Return the device state of an image."""
    objects, meta = (folder / OBJECTS).read_bytes(), (folder / META).read_bytes()
    head = _HEAD.pack(_MAGIC, len(numbers), len(objects), len(meta))
    return b"".join([head, np.ascontiguousarray(numbers, "<u4").tobytes(), objects, meta])


def unpack_state(state: bytes, total: int) -> tuple[Numbers, memoryview, memoryview]:
    """Return (numbers, checkpoint.img, pages_meta.img). Raises Corrupt; every length is checked before it is used."""
    if len(state) < _HEAD.size or state[:4] != _MAGIC:
        raise Corrupt("not a gVisor device state")
    _magic, count, objects, meta = _HEAD.unpack_from(state)
    start = _HEAD.size + 4 * count
    if len(state) != start + objects + meta or max(objects, meta) > _FILE_BYTES_MAX:
        raise Corrupt("the gVisor device state has not the length it says")
    if count > _SHARE_MAX * total:
        raise Corrupt(f"the gVisor device state lists {count} pages for a machine of {total}")
    numbers = np.frombuffer(state, "<u4", count, _HEAD.size)
    used = numbers[numbers != ZERO]
    if len(used) and int(used.max()) >= total:
        raise Corrupt("the gVisor device state names a page beyond the machine's memory")
    view = memoryview(state)
    return numbers, view[start : start + objects], view[start + objects :]


def unpack(folder: Path, state: bytes, memory: PageSet, base: Pages | None, total: int) -> Known:
    """Write an image's three files into `folder` (made here), and return what is known of its pages.

    `memory` lies over `base` (None: zeros). Raises Corrupt; OSError when there is no room.
    """
    numbers, objects, meta = unpack_state(state, total)
    where = np.full(total, -1, np.int64)
    index = np.frombuffer(memory.indices, "<u4")
    if memory.data.nbytes != len(index) * PAGE_BYTES or (len(index) and int(index.max()) >= total):
        raise Corrupt("the snapshot's memory does not fit the machine")
    own = np.frombuffer(memory.data, np.uint8).reshape(-1, PAGE_BYTES)
    where[index] = np.arange(len(index))
    folder.mkdir()
    (folder / OBJECTS).write_bytes(objects)
    (folder / META).write_bytes(meta)
    prints: list[NDArray[np.uint64]] = []
    with (folder / PAGES).open("wb") as out:
        for low in range(0, len(numbers), _BATCH):
            batch = _gather(numbers[low : low + _BATCH], where, own, base)
            prints.append(fingerprints(batch, np.arange(len(batch)), _POOL))
            out.write(batch.data)
    joined = np.concatenate(prints) if prints else np.empty(0, np.uint64)
    filled = np.flatnonzero(numbers != ZERO)
    return Known.of(joined[filled], numbers[filled])


def _gather(numbers: Numbers, where: NDArray[np.int64], own: Pages, base: Pages | None) -> Pages:
    batch = np.zeros((len(numbers), PAGE_BYTES), np.uint8)
    filled = np.flatnonzero(numbers != ZERO)
    at = where[numbers[filled]]
    mine = at >= 0
    batch[filled[mine]] = own[at[mine]]
    if base is not None:
        batch[filled[~mine]] = base[numbers[filled[~mine]]]
    return batch
