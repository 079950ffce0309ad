"""How two snapshots differ in one part, page by page, in the memory of a few thousand pages whatever their size.

Pages that both take from the same place are equal and not read. The rest is read and compared a stretch at a time, so a
machine of many gigabytes costs time, not memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recess.errors import BadInput
from recess.snapshots.classify import words
from recess.snapshots.contract import PageData, PageSource, PartDiff
from recess.snapshots.pagemap import PageMap
from recess.snapshots.reader import OpenSnapshot
from recess.units import PAGE_BYTES

_WINDOW = 4096  # pages: 16 MiB of each side at a time


@dataclass(frozen=True)
class Side:
    """One of the two. `base`: all pages of the part in its template, None for zeros."""

    snapshot: OpenSnapshot
    base: PageData | None

    def pages(self, listed: PageMap, numbers: NDArray[np.int64], sources: Mapping[str, PageSource]) -> PageData:
        """Return the pages of these numbers (ascending). `listed`: its map of at least those that it lists of them."""
        out = self.base_pages(numbers)
        wanted = listed.select(np.isin(listed.pages, numbers))
        if wanted.count:
            out[np.searchsorted(numbers, wanted.pages)] = self.snapshot.read_pages(wanted, sources)
        return out

    def base_pages(self, numbers: NDArray[np.int64]) -> PageData:
        """Return a copy of what the base has there."""
        if self.base is None:
            return np.zeros((len(numbers), PAGE_BYTES), np.uint8)
        found: PageData = self.base[numbers]
        return found


def difference(left: Side, right: Side, part: str, sources: Mapping[str, PageSource]) -> PartDiff:
    """Compare a part. Raises NotFound (no such part, no such source), Corrupt, BadInput (of different sizes)."""
    sides, maps = (left, right), [side.snapshot.page_map(part) for side in (left, right)]
    total = maps[0].pages_total
    if maps[1].pages_total != total:
        raise BadInput(f"{part} has {total} pages in one of the snapshots and {maps[1].pages_total} in the other")
    same_base = left.snapshot.manifest.template == right.snapshot.manifest.template
    listed = changed = zeroed = reverted = 0
    for low in range(0, total, _WINDOW):
        pieces = [page_map.between(low, low + _WINDOW) for page_map in maps]
        own = np.union1d(pieces[0].pages, pieces[1].pages).astype(np.int64)
        listed += len(own)
        numbers = own if same_base else np.arange(low, min(low + _WINDOW, total), dtype=np.int64)
        numbers = np.setdiff1d(numbers, _same_place(pieces), assume_unique=True)
        if not len(numbers):
            continue
        mine, theirs = (side.pages(piece, numbers, sources) for side, piece in zip(sides, pieces, strict=True))
        differ = (words(mine) != words(theirs)).any(axis=1)
        there = words(theirs[differ])
        changed += len(there)
        zeroed += int((~there.any(axis=1)).sum())
        reverted += int((there == words(right.base_pages(numbers[differ]))).all(axis=1).sum())
    return PartDiff(total, listed, changed, zeroed, reverted)


def _same_place(pieces: Sequence[PageMap]) -> NDArray[np.int64]:
    """Return the pages that both maps list with the same source and position."""
    left, right = pieces
    theirs = {source: 1 + number for number, source in enumerate(left.sources)}
    table = np.array([0, *(theirs.get(source, -1) for source in right.sources)], np.int32)
    pages, a, b = np.intersect1d(left.pages, right.pages, assume_unique=True, return_indices=True)
    same = (left.source[a] == table[right.source[b]]) & (left.position[a] == right.position[b])
    found: NDArray[np.int64] = pages[same].astype(np.int64)
    return found
