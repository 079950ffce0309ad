"""Sparse files of 4 KiB blocks: the writable disk, a template's RAM, packed page sets. Synchronous; use a thread.

How the blocks of a capture are found. QEMU copies the disk of the capture's instant by copy-before-write, and only what its
dirty bitmap names. Mostly these are the capture's blocks, with those that a restore had put there if it is to stand alone:
known by their numbers, taken out of the copy (`pick_blocks`), and nothing is compared. Where there is no template to stand
on, or nobody told the numbers, QEMU copies *over* a file that we have filled with the disk as it was at the start, so the
file ends up as the whole disk of that instant; the changed blocks are then those that differ from the base file
(`changed_blocks`). A hole cannot stand for "unchanged" there because a block that the guest zeroed is a hole as well.

The base file never changes while the VM lives: a fork's is its template's disk, a booted machine's is a sparse copy
made at the boot. This module knows neither QEMU nor the keeper, except for the layout of a packed page file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from recess.errors import DriverFailed
from recess.images.disk import blocks_with_data as blocks_with_data
from recess.images.disk import data_extents
from recess.images.files import space_errors
from recess.machines.contract import PageSet
from recess.units import MIB, PAGE_BYTES

Indices = NDArray[np.uint32]
Pages = NDArray[np.uint8]  # (n, 4096)

_INDEX_BYTES = 4
_SLICE_BYTES = 4 * MIB
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h; a punch must keep the size

EMPTY = PageSet(memoryview(b""), memoryview(b""))


def as_arrays(pages: PageSet) -> tuple[Indices, Pages]:
    """Return a page set as arrays over the same bytes. Raises ValueError if its sizes don't fit together."""
    indices = np.frombuffer(pages.indices, dtype="<u4")
    return indices, np.frombuffer(pages.data, dtype=np.uint8).reshape(len(indices), PAGE_BYTES)


def create_sparse(path: Path, size: int) -> int:
    """Create a sparse file, private to the user, and return it open. Raises OutOfSpace, FileExistsError."""
    with space_errors(str(path)):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.truncate(fd, size)
        return fd


def allocated_bytes(path: Path) -> int:
    """Return what a sparse file takes on the disk."""
    return path.stat().st_blocks * 512


def copy_data(source: Path, target: int) -> None:
    """Copy a sparse file's data extents into an open file that holds zeros there. Raises OutOfSpace."""
    with space_errors("a disk"), source.open("rb") as handle:
        for start, end in data_extents(handle.fileno()):
            _copy_range(handle.fileno(), target, start, end)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    """Inside the kernel where it can (not between all filesystems), else through a buffer."""
    with contextlib.suppress(OSError):
        while start < end:
            count = os.copy_file_range(source, target, end - start, start, start)
            if count == 0:
                break
            start += count
    while start < end:
        piece = os.pread(source, min(end - start, MIB), start)
        if not piece:
            return
        start += os.pwrite(target, piece, start)


def _runs(indices: Indices) -> Iterator[tuple[int, int]]:
    """Yield (first, end) positions of consecutive page numbers, at most a slice long."""
    if not len(indices):
        return
    breaks = np.flatnonzero(np.diff(indices.astype(np.int64)) != 1) + 1
    step = _SLICE_BYTES // PAGE_BYTES
    for first, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(indices)], strict=True):
        yield from ((at, min(at + step, end)) for at in range(first, end, step))


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def write_pages(target: int, indices: Indices, data: Pages) -> None:
    """Write pages at their offsets. Raises OutOfSpace."""
    with space_errors("a disk"):
        for first, end in _runs(indices):
            _write_all(target, data[first:end].reshape(-1).data, int(indices[first]) * PAGE_BYTES)


def pack_pages(target: int, indices: Indices, data: Pages) -> None:
    """Write pages the way the keeper reads them: all data from 0, then the page numbers (u32 little endian)."""
    with space_errors("pages"):
        flat = np.ascontiguousarray(data).reshape(-1).data
        for offset in range(0, len(flat), _SLICE_BYTES):
            _write_all(target, flat[offset : offset + _SLICE_BYTES], offset)
        _write_all(target, memoryview(indices.astype("<u4").tobytes()), len(flat))


@dataclass
class Packed:
    """A packed page file, mapped and open (`fd`, -1 if it is empty); `close` lets it go once nobody holds views of it.
    `zeros`: numbers of those of its pages that are known to be zeros; nobody need read them."""

    pages: PageSet
    _map: mmap.mmap | None
    fd: int = -1
    zeros: Indices = field(default_factory=lambda: no_blocks())

    def __post_init__(self) -> None:
        self._shut = None if self.fd < 0 else weakref.finalize(self, os.close, self.fd)

    def close(self) -> None:
        """Unmap, or leave that to the garbage collector while views of the pages are alive."""
        self.pages = EMPTY
        if self._shut is not None:
            self._shut()
            self.fd = -1
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None


def map_packed(fd: int, count: int) -> Packed:
    """Map a packed page file of `count` pages; takes `fd` over. Raises DriverFailed if it is short."""
    try:
        size = count * (PAGE_BYTES + _INDEX_BYTES)
        if os.fstat(fd).st_size < size:
            raise DriverFailed(f"a page file of {count} pages is too short")
        mapping = mmap.mmap(fd, size, prot=mmap.PROT_READ) if count else None
    except BaseException:
        os.close(fd)
        raise
    if mapping is None:
        os.close(fd)
        return Packed(EMPTY, None)
    view = memoryview(mapping)
    return Packed(PageSet(view[count * PAGE_BYTES :], view[: count * PAGE_BYTES]), mapping, fd)


def read_runs(files: Sequence[int], runs: bytes) -> PageSet:
    """Return the pages of a memory in files (`recess.machines.contract.MappedMemory`), for a host that cannot map it."""
    rows = np.frombuffer(runs, "<u4").reshape(-1, 4)
    indices = np.empty(int(rows[:, 1].sum()), "<u4")
    data = np.empty((len(indices), PAGE_BYTES), np.uint8)
    at = 0
    for first, count, number, place in rows.tolist():
        indices[at : at + count] = np.arange(first, first + count, dtype=np.uint32)
        view, offset = data[at : at + count].reshape(-1).data, place * PAGE_BYTES
        while view:  # one call reads less than 2 GiB
            got = os.preadv(files[number], [view], offset)
            if got == 0:
                raise DriverFailed("a page file is too short")
            view, offset = view[got:], offset + got
        at += count
    if not len(indices):
        return EMPTY
    return PageSet(indices.data.cast("B"), data.reshape(-1).data)


def read_packed(path: Path) -> Packed:
    """Map a packed page file by name; empty if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Packed(EMPTY, None)
    return map_packed(fd, os.fstat(fd).st_size // (PAGE_BYTES + _INDEX_BYTES))


def scratch_file(directory: Path) -> IO[bytes]:
    """Return an open file without a name in `directory`: whatever happens, nothing of it is left."""
    with space_errors(str(directory)):
        return tempfile.TemporaryFile(dir=directory)


def no_blocks() -> Indices:
    """Return the numbers of no blocks at all."""
    return np.empty(0, np.uint32)


def _read_run(fd: int, first: int, count: int) -> Pages:
    data = os.pread(fd, count * PAGE_BYTES, first * PAGE_BYTES).ljust(count * PAGE_BYTES, b"\0")
    return np.frombuffer(data, np.uint8).reshape(count, PAGE_BYTES)


def changed_blocks(base: Path | None, image: int, put_over: Indices, directory: Path) -> Packed:
    """Return the blocks of `image` that differ from `base` (None: from zeros), and those of `put_over` in any case.

    The result is backed by a nameless file in `directory`. Raises OutOfSpace.
    """
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(scratch_file(directory)).fileno()
        base_fd = None if base is None else stack.enter_context(base.open("rb")).fileno()
        stack.enter_context(space_errors(str(directory)))
        held = blocks_with_data(image) if base_fd is None else blocks_with_data(image, base_fd)
        candidates = np.union1d(held, put_over).astype(np.uint32)
        found = [np.empty(0, np.uint32)]
        position = 0
        for first, end in _runs(candidates):
            numbers = candidates[first:end]
            now = _read_run(image, int(numbers[0]), len(numbers))
            keep = now.view(np.uint64).any(axis=1)
            if base_fd is not None:
                before = _read_run(base_fd, int(numbers[0]), len(numbers))
                keep = (now.view(np.uint64) != before.view(np.uint64)).any(axis=1)
            keep |= np.isin(numbers, put_over, assume_unique=True)
            _write_all(out, now[keep].reshape(-1).data, position)
            found.append(numbers[keep])
            position += int(keep.sum()) * PAGE_BYTES
        indices = np.concatenate(found)
        _write_all(out, memoryview(indices.astype("<u4").tobytes()), position)
        return map_packed(os.dup(out), len(indices))


def pick_blocks(image: int, numbers: Indices, directory: Path, *, over: Path | None = None) -> Packed:
    """Return these blocks of `image`, whatever is in them, backed by a nameless file in `directory`; without those that are
    holes and zeros in the file `over`, too. Raises OutOfSpace.

    A guest that discards its free space has changed all of it, to zeros: what is a hole in `image` is one in the file, and
    among its `zeros`.
    """
    with scratch_file(directory) as handle, space_errors(str(directory)):
        held = np.isin(numbers, blocks_with_data(image), assume_unique=True)
        if over is not None:
            wanted = held.copy()
            with over.open("rb") as below:
                wanted[~held] = _not_zeros(below.fileno(), numbers[~held])
            numbers, held = numbers[wanted], held[wanted]
        out, size = handle.fileno(), len(numbers) * PAGE_BYTES
        os.truncate(out, size)
        for first, end in _runs(numbers):
            if held[first:end].any():
                data = _read_run(image, int(numbers[first]), end - first)
                _write_all(out, data.reshape(-1).data, first * PAGE_BYTES)
        _write_all(out, memoryview(numbers.astype("<u4").tobytes()), size)
        packed = map_packed(os.dup(out), len(numbers))
        packed.zeros = numbers[~held]
        return packed


def _not_zeros(fd: int, numbers: Indices) -> NDArray[np.bool_]:
    """Tell which of these blocks of a file are not zeros. Holes are not read; but what was allocated and never written is
    told as data once somebody has read it through a mapping, so the rest is."""
    found = np.isin(numbers, blocks_with_data(fd), assume_unique=True)
    rows = np.flatnonzero(found)
    for first, end in _runs(numbers[rows]):
        here = rows[first:end]
        found[here] = _read_run(fd, int(numbers[here[0]]), len(here)).view(np.uint64).any(axis=1)
    return found


def punch_zero_pages(path: Path) -> None:
    """Give back the pages of a file that hold only zeros, so that a template costs what its content costs.

    A guest that zeroes its free memory has touched all of it. The file's content stays the same. A filesystem that
    cannot punch keeps the pages: that costs memory, nothing else.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    with path.open("r+b") as handle:
        fd = handle.fileno()
        for start, end in data_extents(fd):
            for at in range(start, end, _SLICE_BYTES):
                pages = _read_run(fd, at // PAGE_BYTES, -(-min(_SLICE_BYTES, end - at) // PAGE_BYTES))
                zero = np.flatnonzero(~pages.view(np.uint64).any(axis=1)).astype(np.uint32)
                for first, stop in _runs(zero):
                    offset, length = at + int(zero[first]) * PAGE_BYTES, (stop - first) * PAGE_BYTES
                    libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))


def move_sparse(source: Path, target: Path) -> None:
    """Rename, or copy the data between filesystems. Raises OutOfSpace, OSError."""
    try:
        source.replace(target)
    except OSError:
        target.unlink(missing_ok=True)
        fd = create_sparse(target, source.stat().st_size)
        try:
            copy_data(source, fd)
        finally:
            os.close(fd)
        shutil.copymode(source, target)
        source.unlink()
