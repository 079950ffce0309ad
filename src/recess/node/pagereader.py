"""A stored snapshot as a library for the fault handler: frames of its layers, blocks of image files, template pages.

It runs in a pager, a process of its own: it opens the snapshot for itself, and every frame it hands out was verified
against its hash. It must know nothing of page faults.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recess.blobs import BlobStore
from recess.errors import Corrupt
from recess.frames import WorkPool
from recess.node.frames_ahead import FAR, NEAR, FramesAhead
from recess.paging.book import Book, Numbers, Pages, Piece, bridged, make_book, number_groups, pairs
from recess.paging.firstpages import FIRST, decode_first
from recess.paging.server import FILL_GROUPS
from recess.snapshots.keys import LAYER, make_id
from recess.snapshots.layer_v1 import LayerReader
from recess.snapshots.pagemap import KIND_LAYER
from recess.snapshots.reader import OpenSnapshot
from recess.units import PAGE_BYTES

_READERS = 4  # reads at a time, when many are asked for: a store afar answers late

FAR_FILL = 8  # times as much is on its way together when the store is far
_RUN = 16  # pages of a group that is not a frame


def map_pages(path: Path) -> Pages:
    """Map a file as whole pages, read-only; a rest at its end is left out."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    whole = len(mapping) // PAGE_BYTES
    return np.frombuffer(mapping, np.uint8, whole * PAGE_BYTES).reshape(-1, PAGE_BYTES)


class SnapshotPages:
    """One part of a snapshot. `template`: the file its gaps mean; `files`: files of blocks by hash; `far`: a read costs a
    request to a distant store.

    Raises Corrupt, NotFound, Incompatible, Unavailable.
    """

    def __init__(
        self, blobs: BlobStore, snapshot_id: str, part: str, template: Path, files: Mapping[str, Path], *,
        far: bool = False,
    ) -> None:  # fmt: skip
        self._pool = WorkPool(_READERS)
        snapshot = OpenSnapshot(blobs, snapshot_id, self._pool, far=far)
        self._map = snapshot.page_map(part)
        self._template = map_pages(template)
        if len(self._template) != self._map.pages_total:
            raise Corrupt(f"the template has {len(self._template)} pages, the snapshot {self._map.pages_total}")
        snapshot.open_layers(self._map)
        self._layers: list[LayerReader | None] = []
        self._blocks: list[Pages | None] = []
        for source in self._map.sources:
            digest = source.digest.hex()
            is_layer = source.kind == KIND_LAYER
            self._layers.append(snapshot.layer(make_id(LAYER, digest)) if is_layer else None)
            self._blocks.append(None if is_layer else map_pages(files[digest]))
        self._gaps, self._first, self._count = bridged(self._map.pages)
        self._ahead = FramesAhead(*self._frames(), FAR if far else NEAR)
        self.fill_groups = FILL_GROUPS * (FAR_FILL if far else 1)
        hints = snapshot.manifest.spec.get(FIRST)
        self.first_pages = decode_first(hints.get(part)) if isinstance(hints, dict) else []
        self.template_id, self.pages_total = snapshot.manifest.template, self._map.pages_total
        self.stored_bytes = sum(file.bytes for file in snapshot.manifest.layers)

    def ranges(self) -> bytes:
        """Return the absent runs as pairs of u32, little endian: known before the book is made."""
        return pairs(self._first, self._count)

    @property
    def book(self) -> Book:
        """Which group brings which page. Made when it is first asked for, which takes half as long as opening the snapshot:
        whoever waits for the runs does not wait for it. Ask for it in one thread first."""
        return self._numbered[0]

    @cached_property
    def _numbered(self) -> tuple[Book, Numbers, NDArray[np.int64]]:
        """The book, its pages by group, and where each group's begin and end among those."""
        return self._make_book()

    def _frames(self) -> tuple[dict[int, LayerReader], dict[int, NDArray[np.int64]]]:
        """Return the layers by the number of their source, and of each the frames in use."""
        layers = {number: layer for number, layer in enumerate(self._layers, start=1) if layer is not None}
        used = {}
        for number, layer in layers.items():
            frames = self._map.position[self._map.source == number].astype(np.int64) // layer.pages_per_frame
            used[number] = np.flatnonzero(np.bincount(frames, minlength=layer.frame_count))
        return layers, used

    def close(self) -> None:
        """End its threads. May be called twice."""
        self._ahead.close()
        self._pool.close()

    def take_all(self) -> None:
        """Count every page as absent: those that are not listed are the template's."""
        everything = np.arange(self._map.pages_total, dtype=np.uint32)
        self._gaps = np.setdiff1d(everything, self._map.pages, assume_unique=True)
        self._numbered = self._make_book()

    def _make_book(self) -> tuple[Book, Numbers, NDArray[np.int64]]:
        """Number the groups: frames by source, then runs of what is neither in a layer nor listed."""
        listed, source = self._map.pages, self._map.source
        key = np.full(len(listed), -1, np.int64)  # source and frame; or a stretch of _RUN pages
        for number, layer in enumerate(self._layers, start=1):
            mine = source == number
            per_frame = _RUN if layer is None else layer.pages_per_frame
            place = listed[mine] if layer is None else self._map.position[mine]
            key[mine] = (number << 32) + place.astype(np.int64) // per_frame
        zero = source == 0
        key[zero] = listed[zero] // _RUN
        pages = np.concatenate((listed, self._gaps))
        keys = np.concatenate((key, -1 - self._gaps.astype(np.int64) // _RUN))
        order = np.argsort(pages, kind="stable")
        # In the order of the first page of each: the fill goes through memory from its beginning.
        numbers, count = number_groups(keys[order])
        book = make_book(pages[order].astype(np.uint32), numbers, count)
        by_group = np.argsort(numbers, kind="stable")
        bounds = np.concatenate(([0], np.cumsum(np.bincount(numbers, minlength=count))))
        return book, book.pages[by_group], bounds

    def prefetch(self, groups: Sequence[int]) -> None:
        """See `recess.paging.book.Library`. Frames that are neighbours in their layer come by one ranged read."""
        wanted: list[tuple[int, int]] = []
        for group in groups:
            number, at = self._source_of(self._pages_of(group))
            layer = self._layers[number - 1] if number > 0 else None
            if layer is not None:
                wanted.append((number, int(self._map.position[at[0]]) // layer.pages_per_frame))
        self._ahead.expect(wanted)

    def fetch(self, group: int) -> tuple[list[Piece], int]:
        """See `recess.paging.book.Library`."""
        pages = self._pages_of(group)
        number, at = self._source_of(pages)
        if number < 0:
            return _pieces(pages, self._template[pages]), 0
        if number == 0:
            return _pieces(pages, np.zeros((len(pages), PAGE_BYTES), np.uint8)), 0
        layer, position = self._layers[number - 1], self._map.position[at].astype(np.int64)
        if layer is None:
            return _pieces(pages, self._block_pages(number, position)), 0
        frame = int(position[0]) // layer.pages_per_frame
        whole, read = self._ahead.get(number, frame)
        return _pieces(pages, whole[position - frame * layer.pages_per_frame]), read

    def _source_of(self, pages: Numbers) -> tuple[int, NDArray[np.int64]]:
        """Return the number of the source that a group's pages are in, and their rows in the map: 0 for zeros, -1 for the
        template, whose pages are not in the map."""
        at = np.minimum(np.searchsorted(self._map.pages, pages), max(0, self._map.count - 1))
        if not self._map.count or int(self._map.pages[at[0]]) != int(pages[0]):
            return -1, at
        return int(self._map.source[at[0]]), at

    def _block_pages(self, number: int, position: NDArray[np.int64]) -> Pages:
        blocks = self._blocks[number - 1]
        if blocks is None or int(position.max()) >= len(blocks):
            raise Corrupt("the snapshot refers to blocks that its image file does not have")
        return blocks[position]

    def first_page(self, group: int) -> int:
        """Return the lowest page of a group."""
        return int(self._pages_of(group)[0])

    def _pages_of(self, group: int) -> Numbers:
        _, members, bounds = self._numbered
        return members[bounds[group] : bounds[group + 1]]


def _pieces(pages: Numbers, data: Pages) -> list[Piece]:
    """Cut pages into neighbours; the data is contiguous."""
    cuts = np.flatnonzero(np.diff(pages.astype(np.int64)) != 1) + 1
    bounds = [0, *cuts.tolist(), len(pages)]
    return [Piece(int(pages[a]), data[a:b]) for a, b in itertools.pairwise(bounds)]
