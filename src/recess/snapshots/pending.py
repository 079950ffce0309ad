"""One part of a snapshot that is being written: which captured pages are settled, and where they are to be found."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recess.frames import WorkPool
from recess.snapshots.classify import fingerprints
from recess.snapshots.contract import RawPart
from recess.snapshots.pagemap import PageMap, Source, merge, union

Rows = NDArray[np.int64]


@dataclass
class Part:
    """One part on its way. `known`: per source the rows that are there already and their positions. `rows`: the rest.
    `inherited`: the parent's map of the pages that were not captured."""

    raw: RawPart
    rows: Rows
    known: dict[Source | None, tuple[Rows, NDArray[np.int64]]] = field(default_factory=dict)
    inherited: PageMap | None = None
    _prints: NDArray[np.uint64] | None = None

    def page_map(self) -> PageMap:
        """Return the map of all that is settled."""
        mine = merge(self.raw.pages_total, self.raw.indices, self.known)
        return mine if self.inherited is None else union([mine, self.inherited])

    def settle(self, source: Source | None, found: NDArray[np.bool_], positions: NDArray[np.int64]) -> None:
        """Note that the rows where `found` (a mask over `rows`) holds are in `source` at these positions."""
        if found.any():
            old_rows, old_positions = self.known.get(source, (np.empty(0, np.int64), np.empty(0, np.int64)))
            self.known[source] = (
                np.concatenate((old_rows, self.rows[found])),
                np.concatenate((old_positions, positions[found])),
            )
            self.rows = self.rows[~found]

    def prints(self, pool: WorkPool) -> NDArray[np.uint64]:
        """Return a fingerprint for each captured row, as far as it was open when this was first asked."""
        if self._prints is None:
            self._prints = np.zeros(len(self.raw.data), np.uint64)
            self._prints[self.rows] = fingerprints(self.raw.data, self.rows, pool)
        return self._prints
