"""How a fake guest's state lies in real 4 KiB pages, so that its snapshots go through the real store.

Layout of a part: page 0 begins with MAGIC and the length (u64 little endian) of one MessagePack blob that follows on
the next pages; pages that a test poked directly lie from POKE_FIRST upwards. Pure functions; knows nothing of VMs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from recess.errors import Corrupt
from recess.machines.contract import PageSet
from recess.units import PAGE_BYTES

MAGIC = b"RCSFAKE1"
POKE_FIRST = 1 << 15  # page number; the blob stays below it (128 MiB)
_ZERO = bytes(PAGE_BYTES)

Pages = dict[int, bytes]
ReadPage = Callable[[int], bytes]


def encode(blob: bytes, poked: Mapping[int, bytes]) -> Pages:
    """Return the pages that hold `blob` and the poked pages; every other page is zero."""
    pages: Pages = {0: (MAGIC + struct.pack("<Q", len(blob))).ljust(PAGE_BYTES, b"\0")}
    for number, start in enumerate(range(0, len(blob), PAGE_BYTES), start=1):
        pages[number] = blob[start : start + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
    pages.update(poked)
    return pages


def decode(read_page: ReadPage) -> bytes:
    """Return the blob; raises Corrupt when the head is not ours."""
    head = read_page(0)
    if head[:8] != MAGIC:
        raise Corrupt("fake guest: the part does not start with the fake driver's magic")
    (length,) = struct.unpack_from("<Q", head, 8)
    if length > (POKE_FIRST - 1) * PAGE_BYTES:
        raise Corrupt(f"fake guest: state of {length} bytes is over the cap")
    count = -(-length // PAGE_BYTES)
    return b"".join(read_page(number) for number in range(1, count + 1))[:length]


def changed(current: Pages, base: Pages) -> PageSet:
    """Return every page that differs from `base`, pages that became zero included."""
    numbers = sorted(
        number for number in current.keys() | base.keys() if current.get(number, _ZERO) != base.get(number, _ZERO)
    )
    indices = np.array(numbers, dtype="<u4")
    data = b"".join(current.get(number, _ZERO) for number in numbers)
    return PageSet(memoryview(indices.tobytes()), memoryview(data))


def as_pages(pages: PageSet) -> Pages:
    """Return a page set as a mapping of its own copies."""
    indices = np.frombuffer(pages.indices, dtype="<u4")
    data = memoryview(pages.data).cast("B")
    return {int(n): bytes(data[i * PAGE_BYTES : (i + 1) * PAGE_BYTES]) for i, n in enumerate(indices)}


class Writes:
    """What a real driver's dirty tracking knows: memory and disk at the last stored snapshot, and at the last capture."""

    def __init__(self, snapshot: str, memory: Pages, disk: Pages) -> None:
        self._base, self._base_parts = snapshot, (memory, disk)
        self._captured = (memory, disk)
        self._generation = 0

    def delta(self, memory: Pages, disk: Pages, parent: str) -> tuple[PageSet, PageSet] | None:
        """Return what of both changed since the snapshot `parent`, or None if changes are not known since that one."""
        if not parent or parent != self._base:
            return None
        return changed(memory, self._base_parts[0]), changed(disk, self._base_parts[1])

    def capture(self, memory: Pages, disk: Pages) -> int:
        """Note a capture of these; return its generation."""
        self._captured = (memory, disk)
        self._generation += 1
        return self._generation

    def committed(self, generation: int, snapshot: str) -> None:
        """Count from the last capture from now on, if it is the one that was stored."""
        if generation == self._generation:
            self._base, self._base_parts = snapshot, self._captured
