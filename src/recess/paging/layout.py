"""Where each page of a memory lies in a few files, and how few mappings that takes. Pure arithmetic over arrays.

A layout has *mapped* pages and *strays*. A run of mapped pages, neighbours both in the memory and in one file, is one
mapping. The kernel allows a process some 65530 of them and each costs microseconds, so pages that would cut runs into many
short ones are strays: copied over what is mapped there (whatever that is), page by page.

This module knows neither files' names nor who maps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recess.paging.book import Numbers

RUNS_CALM = 1024
"""More runs than this are not worth their mappings: short ones become strays (measured: some 15 us a run, 2 us a page)."""

RUNS_MAX = 8192
STRAYS_MAX = 8192  # pages: 32 MiB are copied at each restore; beyond, the whole is written anew
FILES_MAX = 16
SHORT_RUN = 16
DEAD_SPARE = 16384  # pages of files that no page lies in any more and that are not worth a word: 64 MiB

Rows = NDArray[np.uint32]  # (n, 4): first page, count, file, first page in the file


@dataclass(frozen=True)
class Places:
    """Pages, ascending, and for each the file and the page in that file."""

    pages: Numbers
    file: Numbers
    at: Numbers

    def __len__(self) -> int:
        return len(self.pages)

    def select(self, rows: NDArray[np.bool_]) -> Places:
        """Return these rows only."""
        return Places(self.pages[rows], self.file[rows], self.at[rows])

    def take(self, rows: NDArray[np.int64]) -> Places:
        """Return the places at these rows."""
        return Places(self.pages[rows], self.file[rows], self.at[rows])

    def over(self, below: Places) -> Places:
        """Return these pages, and those of `below` that are not among them."""
        kept = below.select(~np.isin(below.pages, self.pages, assume_unique=True))
        pages = np.concatenate((self.pages, kept.pages))
        order = np.argsort(pages, kind="stable")
        file, at = np.concatenate((self.file, kept.file)), np.concatenate((self.at, kept.at))
        return Places(pages[order], file[order], at[order])

    def starts(self) -> NDArray[np.int64]:
        """Return the rows where runs start: neighbours in the memory and in one file are one run."""
        if not len(self):
            return np.empty(0, np.int64)
        same = (
            (np.diff(self.pages.astype(np.int64)) == 1)
            & (np.diff(self.at.astype(np.int64)) == 1)
            & (self.file[1:] == self.file[:-1])
        )
        return np.concatenate(([0], np.flatnonzero(~same) + 1))

    def rows(self) -> Rows:
        """Return the runs."""
        starts = self.starts()
        counts = np.diff(starts, append=len(self))
        columns = (self.pages[starts], counts.astype(np.uint32), self.file[starts], self.at[starts])
        return np.stack(columns, axis=1).astype("<u4")


NOTHING = Places(*(np.empty(0, np.uint32) for _ in range(3)))


def in_file(pages: Numbers, number: int) -> Places:
    """Return the places of pages that lie back to back in one file."""
    at = np.arange(len(pages), dtype=np.uint32)
    return Places(pages.astype(np.uint32), np.full(len(pages), number, np.uint32), at)


def places_of(rows: Rows) -> Places:
    """Return the pages of runs."""
    counts = rows[:, 1].astype(np.int64)
    inner = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    first, file, at = (np.repeat(rows[:, n], counts) for n in (0, 2, 3))
    return Places((first + inner).astype(np.uint32), file.astype(np.uint32), (at + inner).astype(np.uint32))


@dataclass(frozen=True)
class Layout:
    """A whole memory. A stray's content is the stray's, whatever is mapped there."""

    mapped: Places = NOTHING
    strays: Places = NOTHING

    def all(self) -> Places:
        """Return every page with where its content is."""
        return self.strays.over(self.mapped)

    def files(self) -> list[int]:
        """Return the numbers of the files that it needs, ascending."""
        return sorted({*np.unique(self.mapped.file).tolist(), *np.unique(self.strays.file).tolist()})

    def renumbered(self, numbers: Sequence[int]) -> Layout:
        """Return it with file `numbers[n]` called `n`."""
        table = np.zeros(max(numbers, default=0) + 1, np.uint32)
        table[list(numbers)] = np.arange(len(numbers), dtype=np.uint32)
        mapped, strays = self.mapped, self.strays
        return Layout(
            Places(mapped.pages, table[mapped.file] if len(mapped) else mapped.file, mapped.at),
            Places(strays.pages, table[strays.file] if len(strays) else strays.file, strays.at),
        )


def put_over(new: Places, below: Layout, *, runs_calm: int = RUNS_CALM) -> Layout:
    """Return the layout of `new` pages over an older one. Short runs become strays only if there are too many runs."""
    strays = below.strays.select(~np.isin(below.strays.pages, new.pages, assume_unique=True))
    mapped = new.over(below.mapped)
    starts = mapped.starts()
    if len(starts) <= runs_calm:
        return Layout(mapped, strays)
    counts = np.diff(starts, append=len(mapped))
    short = np.repeat(counts < SHORT_RUN, counts) & np.isin(mapped.pages, new.pages, assume_unique=True)
    loose = mapped.select(short)
    return Layout(mapped.select(~short).over(below.mapped), loose.over(strays))


def is_good(layout: Layout, file_pages: Sequence[int]) -> bool:
    """Tell whether a layout is cheap to bring back and wastes little; else the whole is worth writing anew.

    `file_pages`: how many pages each of its files holds.
    """
    live = len(layout.mapped) + len(layout.strays)
    return (
        len(layout.mapped.starts()) <= RUNS_MAX
        and len(layout.strays) <= STRAYS_MAX
        and len(file_pages) <= FILES_MAX
        and sum(file_pages) <= 2 * live + DEAD_SPARE
    )


def with_gaps(pages: Numbers, gaps: Numbers) -> tuple[Numbers, NDArray[np.bool_]]:
    """Return pages and gaps as one ascending array, and which of it are gaps."""
    both = np.concatenate((pages, gaps))
    order = np.argsort(both, kind="stable")
    return both[order].astype(np.uint32), (order >= len(pages))
