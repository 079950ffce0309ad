"""Which pages are absent, and in which groups they are fetched. A group is what one read brings: a frame of a layer.

Pages between two absent runs that lie close together count as absent, too (the kernel splits its mapping at every
border, and allows 65530 of them): whoever makes the book says where those gaps' content comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.uint8]  # (n, 4096), C-contiguous
Numbers = NDArray[np.uint32]

GAP_MAX = 8
RUNS_MAX = 8192


@dataclass(frozen=True)
class Piece:
    """Neighbouring pages with their content."""

    first: int
    data: Pages


class Library(Protocol):
    """Where groups come from. Called from several threads; raises Corrupt, NotFound, Unavailable."""

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to read what these groups need, in the order in which they will be fetched and in as few reads as can be;
        returns at once. What fails on the way comes up when the group is fetched."""
        ...

    def fetch(self, group: int) -> tuple[list[Piece], int]:
        """Return all absent pages of a group, verified, and how many stored bytes were read for them."""
        ...


@dataclass(frozen=True)
class Book:
    """The absent pages of one memory. `pages` ascends; `group` says for each which group brings it; `groups`: how many.

    `first`, `count`: the absent pages as runs.
    """

    pages: Numbers
    group: NDArray[np.int32]
    groups: int
    first: Numbers
    count: Numbers

    def group_of(self, page: int) -> int | None:
        """Return the group that brings a page, or None if it is not absent."""
        at = int(np.searchsorted(self.pages, page))
        return int(self.group[at]) if at < len(self.pages) and int(self.pages[at]) == page else None

    def ranges(self) -> bytes:
        """Return the runs as pairs of u32, little endian: first page, count."""
        return pairs(self.first, self.count)


def pairs(first: Numbers, count: Numbers) -> bytes:
    """Return runs as pairs of u32, little endian: first page, count."""
    return np.stack((first, count), axis=1).astype("<u4").tobytes()


def make_book(pages: Numbers, group: NDArray[np.int32], groups: int) -> Book:
    """Return the book of these pages (ascending)."""
    starts, counts = runs_of(pages)
    return Book(pages, group, groups, pages[starts], counts)


def runs_of(pages: Numbers) -> tuple[NDArray[np.int64], Numbers]:
    """Return the rows where runs of neighbouring pages start, and how long each is."""
    if not len(pages):
        return np.empty(0, np.int64), np.empty(0, np.uint32)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(pages.astype(np.int64)) != 1) + 1))
    return starts, np.diff(starts, append=len(pages)).astype(np.uint32)


def number_groups(keys: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Return for each page (of ascending ones) the number of its group, and how many there are. Pages of one key are a group;
    groups are numbered by their first page.

    Pages that lie together mostly come from one place: what is sorted are the stretches of one key, not the pages.
    """
    if not len(keys):
        return np.empty(0, np.int32), 0
    starts = np.concatenate(([0], np.flatnonzero(np.diff(keys)) + 1))
    _, first, group = np.unique(keys[starts], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first), dtype=np.int32)
    return np.repeat(rank[group.reshape(-1)], np.diff(starts, append=len(keys))), len(first)


def gaps_of(pages: Numbers, *, gap_max: int = GAP_MAX, runs_max: int = RUNS_MAX) -> Numbers:
    """Return the pages in gaps of at most `gap_max` between the runs of `pages`; of more, when there would be more than
    `runs_max` runs otherwise."""
    return bridged(pages, gap_max=gap_max, runs_max=runs_max)[0]


def bridged(pages: Numbers, *, gap_max: int = GAP_MAX, runs_max: int = RUNS_MAX) -> tuple[Numbers, Numbers, Numbers]:
    """Return what `gaps_of` does, and the runs of `pages` together with those gaps: first pages, counts. They are known long
    before it is known who brings which page."""
    starts, counts = runs_of(pages)
    if not len(starts):
        nothing = np.empty(0, np.uint32)
        return nothing, nothing, nothing
    first = pages[starts].astype(np.int64)
    ends = first + counts
    gaps = first[1:] - ends[:-1]
    while int((gaps > gap_max).sum()) + 1 > runs_max:
        gap_max *= 2
    small = gaps <= gap_max
    lengths, firsts = gaps[small], ends[:-1][small]
    before = np.cumsum(lengths) - lengths  # pages of the gaps before each
    between = (np.repeat(firsts - before, lengths) + np.arange(int(lengths.sum()))).astype(np.uint32)
    begins, last = first[np.concatenate(([True], ~small))], ends[np.concatenate((~small, [True]))]
    return between, begins.astype(np.uint32), (last - begins).astype(np.uint32)
