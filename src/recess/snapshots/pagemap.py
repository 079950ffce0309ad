"""Where each page of a part comes from, in memory: three parallel arrays. The stored form is `pagemap_v1`.

Only pages that differ from the base are listed (the base is the template's part, or zeros without a template). A
page's source is a file of blocks known by hash (root image, kernel), a layer, or nothing at all: zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ZERO = 0  # the source number that means: a page of zeros
KIND_BLOCKS = 1
KIND_LAYER = 2
PAGES_MAX = 1 << 28  # pages in one part: 1 TiB


@dataclass(frozen=True, order=True)
class Source:
    """A file of pages: KIND_BLOCKS or KIND_LAYER, and its hash (32 bytes). Ordered, so that tables are canonical."""

    kind: int
    digest: bytes


@dataclass(frozen=True)
class PageMap:
    """The listed pages of one part. `pages` ascends; `source` is 0 for zeros, else 1 + the place in `sources`.

    `position`: block number or slot number in that source; 0 for zeros.
    """

    pages_total: int
    pages: NDArray[np.uint32]
    source: NDArray[np.int32]
    position: NDArray[np.uint32]
    sources: tuple[Source, ...]

    @property
    def count(self) -> int:
        """How many pages are listed."""
        return len(self.pages)

    def counts(self) -> tuple[int, int, int]:
        """Return how many pages are zeros, blocks of a file, slots of a layer."""
        kinds = np.array([ZERO, *(source.kind for source in self.sources)])[self.source]
        zeros, blocks, layers = (int((kinds == kind).sum()) for kind in (ZERO, KIND_BLOCKS, KIND_LAYER))
        return zeros, blocks, layers

    def rows_by_source(self) -> dict[Source | None, NDArray[np.int64]]:
        """Return for each source in use (None: zeros) the rows of the arrays that refer to it, ascending."""
        if not self.count:
            return {}
        used = distinct(self.source, 1 + len(self.sources)).tolist()
        return {self.sources[n - 1] if n else None: np.flatnonzero(self.source == n) for n in used}

    def between(self, low: int, high: int) -> PageMap:
        """Return the part of the map with low <= page < high; page numbers stay as they are."""
        first, last = np.searchsorted(self.pages, (low, high))
        return self.select(slice(int(first), int(last)))

    def select(self, rows: slice | NDArray[np.bool_]) -> PageMap:
        """Return the map of these rows only."""
        return PageMap(self.pages_total, self.pages[rows], self.source[rows], self.position[rows], self.sources)

    def without(self, pages: NDArray[np.uint32]) -> PageMap:
        """Return the map without these pages (ascending)."""
        if not len(pages):
            return self
        at = np.minimum(np.searchsorted(pages, self.pages), len(pages) - 1)
        return self.select(pages[at] != self.pages)


def distinct(numbers: NDArray[np.integer[Any]], below: int) -> NDArray[np.int64]:
    """Return the different ones of these numbers, ascending; all are 0 <= n < `below`. Ten times as fast as np.unique."""
    there = np.zeros(below, np.bool_)
    there[numbers] = True
    return np.flatnonzero(there)


def merge(pages_total: int, pages: NDArray[np.uint32], rows: dict[Source | None, tuple[NDArray[np.int64], NDArray[np.int64]]]) -> PageMap:  # fmt: skip
    """Return the map of `pages` from, per source, (rows of `pages`, positions). Rows that no source names are left out."""
    sources = tuple(sorted(source for source in rows if source is not None))
    number = np.full(len(pages), -1, np.int32)
    position = np.zeros(len(pages), np.uint32)
    for source, (which, where) in rows.items():
        number[which] = ZERO if source is None else 1 + sources.index(source)
        position[which] = where
    kept = number >= 0
    return PageMap(pages_total, pages[kept], number[kept], position[kept], sources)


def union(maps: Sequence[PageMap]) -> PageMap:
    """Return one map of all pages that the given maps of one part list; no page may be in two of them."""
    used = [distinct(page_map.source, 1 + len(page_map.sources)) for page_map in maps]
    used = [numbers[numbers > 0] - 1 for numbers in used]
    sources = tuple(sorted({m.sources[int(n)] for m, numbers in zip(maps, used, strict=True) for n in numbers}))
    renumbered = []
    for page_map, numbers in zip(maps, used, strict=True):
        table = np.zeros(len(page_map.sources) + 1, np.int32)
        for number in numbers.tolist():
            table[number + 1] = 1 + sources.index(page_map.sources[number])
        renumbered.append(table[page_map.source])
    pages = np.concatenate([page_map.pages for page_map in maps])
    order = np.argsort(pages, kind="stable")
    position = np.concatenate([page_map.position for page_map in maps])[order]
    return PageMap(maps[0].pages_total, pages[order], np.concatenate(renumbered)[order], position, sources)


def same_leaves(old: PageMap, new: PageMap, leaf_pages: int) -> NDArray[np.int64]:
    """Return the numbers of the leaves that list the same pages with the same sources in both maps of one part."""
    theirs = {source: 1 + number for number, source in enumerate(old.sources)}
    table = np.array(
        [ZERO, *(theirs.get(source, -1) for source in new.sources)], np.int32
    )  # their numbers of our sources
    sides = [page_map.pages // leaf_pages for page_map in (old, new)]
    leaves = -(-max(old.pages_total, new.pages_total) // leaf_pages)
    counts, more = (np.bincount(side, minlength=leaves) for side in sides)
    alike = (counts == more) & (counts > 0)  # only these can be the same; they have equally many rows on both sides
    a, b = (page_map.select(alike[side]) for page_map, side in zip((old, new), sides, strict=True))
    differ = (a.pages != b.pages) | (a.source != table[b.source]) | (a.position != b.position)
    alike[a.pages[differ] // leaf_pages] = False
    return np.flatnonzero(alike)


def runs_of(page_map: PageMap, leaf_pages: int) -> NDArray[np.int64]:
    """Return the starts (rows) of maximal runs: neighbours in page, source and position, within one leaf."""
    pages, source, position = page_map.pages, page_map.source, page_map.position.astype(np.int64)
    if not len(pages):
        return np.empty(0, np.int64)
    step = np.where(source[1:] == ZERO, 0, 1)  # zeros have no position to go forward in
    same = (
        (np.diff(pages.astype(np.int64)) == 1)
        & (pages[1:] % leaf_pages != 0)
        & (source[1:] == source[:-1])
        & (np.diff(position) == step)
    )
    return np.concatenate(([0], np.flatnonzero(~same) + 1))


def expand(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ... for each run, all in one array."""
    ends = np.cumsum(counts)
    shift = np.repeat(starts - (ends - counts), counts)
    out: NDArray[np.int64] = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) + shift
    return out
