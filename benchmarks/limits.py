"""The physical limits of one snapshot: the same bytes copied, compressed, written and fsynced, with nothing around it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recess.frames import WorkPool

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FRAME_BYTES = 64 * 1024


def limits(pages: NDArray[np.uint8], folder: Path, *, level: int) -> dict[str, float]:
    """Return seconds of: memcpy, zstd (as many threads as the store has), write and fsync of what zstd made."""
    content = np.ascontiguousarray(pages).data.cast("B")
    target = np.zeros_like(pages)  # touched: no page faults in the copy
    pool = WorkPool(2)
    times = [time.perf_counter()]
    np.copyto(target, pages)
    times.append(time.perf_counter())
    packed = _compress(content, level, pool)
    times.append(time.perf_counter())
    _write_synced(folder, packed)
    times.append(time.perf_counter())
    pool.close()
    return dict(zip(("memcpy", "zstd", "fsync"), np.diff(times).tolist(), strict=True))


def _compress(content: memoryview, level: int, pool: WorkPool) -> list[bytes]:
    """Compress and nothing else: no hashes, no choice of pages."""

    def half(start: int, end: int) -> list[bytes]:
        encoder = zstd.ZstdCompressor(level=level)
        cuts = range(start, end, FRAME_BYTES)
        return [encoder.compress(content[at : min(at + FRAME_BYTES, end)], encoder.FLUSH_FRAME) for at in cuts]

    cut = len(content) // 2 // FRAME_BYTES * FRAME_BYTES
    halves = pool.each([lambda: half(0, cut), lambda: half(cut, len(content))])
    return halves[0] + halves[1]


def _write_synced(folder: Path, pieces: list[bytes]) -> None:
    fd, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(fd, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    finally:
        Path(name).unlink()
