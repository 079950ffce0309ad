"""Between a driver's pages and the snapshot store's: mapped template files, page sets, raw parts. No copies.

Pure translation plus read-only mappings; it must know nothing of machines' states or names.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recess.errors import Corrupt
from recess.images.disk import blocks_with_data
from recess.machines.contract import Capture, MappedMemory, PageSet, TemplateRef
from recess.paging.book import RUNS_MAX, runs_of
from recess.paging.layout import Layout, in_file, is_good, places_of, put_over
from recess.snapshots.contract import Overlay, PageData, PageIndices, RawPart
from recess.units import PAGE_BYTES

MEMORY = "memory"
DISK = "disk0"


def to_part(name: str, pages: PageSet, pages_total: int, *, inherits: bool = False, zeros: bytes = b"") -> RawPart:
    """Return a driver's page set as the store takes it; the buffers stay the driver's. `inherits`: see `RawPart`; `zeros`:
    numbers of pages that are known to be zeros."""
    indices: PageIndices = np.frombuffer(pages.indices, dtype="<u4")
    data: PageData = np.frombuffer(pages.data, dtype=np.uint8).reshape(-1, PAGE_BYTES)
    if len(indices) != len(data):
        raise Corrupt(f"capture: {len(indices)} page numbers for {len(data)} pages of {name}")
    known = np.isin(indices, np.frombuffer(zeros, dtype="<u4"), assume_unique=True) if zeros else None
    return RawPart(name, pages_total, indices, data, inherits, known)


def capture_parts(capture: Capture) -> list[RawPart]:
    """Return both parts of a capture."""
    return [
        to_part(MEMORY, capture.memory, capture.memory_pages_total, inherits=bool(capture.parent)),
        to_part(
            DISK, capture.disk, capture.disk_blocks_total, inherits=bool(capture.disk_parent), zeros=capture.disk_zeros
        ),
    ]


def mapped_capture(capture: Capture) -> MappedMemory | None:
    """Return a capture's memory as what other machines can map, while the capture is open; None if it is in no file."""
    if capture.memory_file < 0:
        return None
    numbers: PageIndices = np.frombuffer(capture.memory.indices, dtype="<u4")
    starts, counts = runs_of(numbers)
    if len(starts) > RUNS_MAX:
        return None
    rows = np.stack((numbers[starts], counts, np.zeros_like(counts), starts.astype(np.uint32)), axis=1)
    return MappedMemory((capture.memory_file,), rows.astype("<u4").tobytes(), owner=capture)


def mapped_over(below: MappedMemory, capture: Capture) -> MappedMemory | None:
    """Return the memory of a capture that counts from a snapshot whose memory is at hand: what changed over what did not.
    None if that would take too many mappings. To be used while the capture is open."""
    if capture.memory_file < 0 and capture.memory.count:
        return None
    numbers: PageIndices = np.frombuffer(capture.memory.indices, dtype="<u4")
    older = Layout(*(places_of(np.frombuffer(rows, "<u4").reshape(-1, 4)) for rows in (below.runs, below.strays)))
    layout = put_over(in_file(numbers, len(below.files)), older)
    files = (*below.files, capture.memory_file) if capture.memory.count else below.files
    if not is_good(layout, [0] * len(files)):
        return None
    mapped, strays = layout.mapped.rows().tobytes(), layout.strays.rows().tobytes()
    return MappedMemory(files, mapped, strays, owner=(below, capture))


def to_pages(overlay: Overlay) -> PageSet:
    """Return the store's overlay as a driver takes it."""
    indices = np.ascontiguousarray(overlay.indices, dtype="<u4")
    data = np.ascontiguousarray(overlay.data, dtype=np.uint8)
    return PageSet(_bytes_view(indices), _bytes_view(data))


def _bytes_view(array: NDArray[Any]) -> memoryview:
    # A memoryview of an array with a zero in its shape cannot be cast: an empty one is spelled out.
    return array.data.cast("B") if array.size else memoryview(b"")


class MappedTemplate:
    """A template's files as arrays of pages; fulfils `recess.snapshots.contract.TemplatePages` for the parts it has."""

    def __init__(self, template_id: str, files: Mapping[str, Path]) -> None:
        self._id = template_id
        self._maps: list[mmap.mmap] = []
        self._held: dict[str, PageIndices] = {}
        self._parts = {name: self._map(name, path) for name, path in files.items()}

    @classmethod
    def of(cls, ref: TemplateRef) -> MappedTemplate:
        """Map RAM and disk."""
        return cls(ref.id, {MEMORY: ref.ram, DISK: ref.disk})

    def _map(self, name: str, path: Path) -> PageData:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or size % PAGE_BYTES:
                raise Corrupt(f"template file {path.name} has {size} bytes, not whole pages")
            mapping = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            self._held[name] = blocks_with_data(file.fileno())
        self._maps.append(mapping)
        return np.frombuffer(mapping, dtype=np.uint8).reshape(-1, PAGE_BYTES)

    @property
    def template_id(self) -> str:
        """The template's manifest id."""
        return self._id

    def part(self, name: str) -> PageData:
        """Return all pages of a part, read-only."""
        return self._parts[name]

    def held(self, name: str) -> PageIndices:
        """See `TemplatePages.held`: a template's files never change, so what is a hole stays one."""
        return self._held[name]


def file_part(name: str, path: Path) -> RawPart:
    """Return every non-zero page of a sparse file, holes skipped, as a raw part."""
    numbers: list[NDArray[np.uint32]] = []
    pieces: list[NDArray[np.uint8]] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size % PAGE_BYTES:
            raise Corrupt(f"{path.name} has {size} bytes, not whole pages")
        at = 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            at = min(-(-os.lseek(file.fileno(), start, os.SEEK_HOLE) // PAGE_BYTES) * PAGE_BYTES, size)
            start -= start % PAGE_BYTES
            pages = np.frombuffer(os.pread(file.fileno(), at - start, start), dtype=np.uint8).reshape(-1, PAGE_BYTES)
            used = np.nonzero(pages.view(np.uint64).any(axis=1))[0]
            if len(used):
                numbers.append((used + start // PAGE_BYTES).astype("<u4"))
                pieces.append(pages[used])
    indices: PageIndices = np.concatenate(numbers) if numbers else np.empty(0, dtype="<u4")
    data: PageData = np.concatenate(pieces) if pieces else np.empty((0, PAGE_BYTES), dtype=np.uint8)
    return RawPart(name, size // PAGE_BYTES, indices, data)
