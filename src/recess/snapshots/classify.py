"""Which captured pages are already known: zeros, equal to the template's, equal to each other. Pure, vectorised.

Nothing here trusts a hash: what is called equal was compared byte for byte. Rows are indices into a part's captured
pages. Work is cut into batches that stay in the second-level cache and can run in several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from recess.frames import WorkPool
from recess.snapshots.contract import PageData, PageIndices

Rows = NDArray[np.int64]
_WORDS = 512  # 64-bit words in a page
_BATCH = 256  # pages: 1 MiB

FRESH, IS_ZERO, IS_BASE = 0, 1, 2


def words(data: PageData) -> NDArray[np.uint64]:
    """Return pages as rows of 64-bit words: comparing those is 15 times faster than bytes."""
    return data.view(np.uint64)


def take(data: PageData, rows: Rows) -> PageData:
    """Return these rows (ascending); without a copy where they are neighbours."""
    if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
        return data[int(rows[0]) : int(rows[-1]) + 1]
    return data[rows]


def against_base(
    data: PageData, indices: PageIndices, template: PageData | None, pool: WorkPool, *,
    zeros: NDArray[np.bool_] | None = None, held: PageIndices | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Return per row IS_BASE (equal to the template's page of that number; without a template: zeros), IS_ZERO
    (zeros where the template's page is not), or FRESH. What is known to be zeros is not read: rows of `zeros`, and pages of the
    template that are not among `held` (read through a mapping, a hole would take memory ever after)."""
    kind = np.zeros(len(data), np.uint8)
    base = None if template is None else words(template)
    rows = np.arange(len(data)) if zeros is None else np.flatnonzero(~zeros)
    there = np.ones(len(data), np.bool_)
    if base is not None and held is not None:
        known = np.zeros(len(base), np.bool_)
        known[held] = True
        there = known[indices]

    def batch(low: int) -> None:
        here = rows[low : low + _BATCH]
        part = words(take(data, here))
        zero = ~part.any(axis=1)
        if base is None:
            kind[here[zero]] = IS_BASE
            return
        with_base = there[here]
        kind[here[zero]] = np.where(with_base[zero], IS_ZERO, IS_BASE)
        mine, part = (here, part) if with_base.all() else (here[with_base], part[with_base])
        kind[mine[(part == base[indices[mine]]).all(axis=1)]] = IS_BASE

    pool.each([partial(batch, low) for low in range(0, len(rows), _BATCH)])
    if zeros is not None and zeros.any():
        kind[zeros] = IS_BASE
        if base is not None:
            _zeros_over(kind, indices, np.flatnonzero(zeros & there), base, pool)
    return kind


def _zeros_over(
    kind: NDArray[np.uint8], indices: PageIndices, rows: Rows, base: NDArray[np.uint64], pool: WorkPool
) -> None:
    """Note which of these rows, zeros all, are not what the base has there."""

    def batch(low: int) -> None:
        here = rows[low : low + _BATCH]
        kind[here[base[indices[here]].any(axis=1)]] = IS_ZERO

    pool.each([partial(batch, low) for low in range(0, len(rows), _BATCH)])


def look_up(
    data: PageData, rows: Rows, lookup: Callable[[PageData], NDArray[np.int64]], pool: WorkPool
) -> NDArray[np.int64]:
    """Return per row of `rows` the block that `lookup` finds for it, or -1."""
    found = np.full(len(rows), -1, np.int64)

    def batch(low: int) -> None:
        found[low : low + _BATCH] = lookup(take(data, rows[low : low + _BATCH]))

    pool.each([partial(batch, low) for low in range(0, len(rows), _BATCH)])
    return found


def _keys() -> NDArray[np.uint64]:
    state = np.random.Generator(np.random.PCG64(20))
    keys: NDArray[np.uint64] = state.integers(0, 1 << 63, _WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return keys


_KEYS = _keys()  # a fingerprint only proposes: no need that it is the same elsewhere


def fingerprints(data: PageData, rows: Rows, pool: WorkPool) -> NDArray[np.uint64]:
    """Return a 64-bit fingerprint per row: the sum of its words times fixed odd keys."""
    out = np.empty(len(rows), np.uint64)

    def batch(low: int) -> None:
        np.matmul(words(take(data, rows[low : low + _BATCH])), _KEYS, out=out[low : low + _BATCH])

    pool.each([partial(batch, low) for low in range(0, len(rows), _BATCH)])
    return out


def first_equal(
    parts: Sequence[tuple[PageData, Rows]], pool: WorkPool, prints: Sequence[NDArray[np.uint64]] | None = None
) -> NDArray[np.int64]:
    """Return, for each entry (all rows of all parts, one after the other), the first entry with the same bytes.

    Only the first entry of each fingerprint is compared with, so pages made to collide cost no more than others.
    `prints`: the rows' fingerprints, if they are known.
    """
    if prints is None:
        prints = [fingerprints(data, rows, pool) for data, rows in parts]
    joined = np.concatenate(prints) if prints else np.empty(0, np.uint64)
    _, first, group = np.unique(joined, return_index=True, return_inverse=True)
    canonical: NDArray[np.int64] = first[group].astype(np.int64)
    everyone = np.arange(len(joined))
    starts = np.cumsum([0, *(len(rows) for _, rows in parts)])

    def gather(entries: NDArray[np.int64]) -> PageData:
        out = np.empty((len(entries), _WORDS * 8), np.uint8)
        for number, (data, rows) in enumerate(parts):
            here = (entries >= starts[number]) & (entries < starts[number + 1])
            out[here] = data[rows[entries[here] - starts[number]]]
        return out

    for entries in _batches(np.flatnonzero(canonical != everyone)):
        differ = (words(gather(entries)) != words(gather(canonical[entries]))).any(axis=1)
        canonical[entries[differ]] = entries[differ]
    return canonical


def _batches(entries: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for low in range(0, len(entries), _BATCH):
        yield entries[low : low + _BATCH]
