"""The table of a file's frames, whatever version of the index it was read from. Knows nothing of bytes on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recess.errors import Corrupt
from recess.frames.zstd import FRAME_RAW_BYTES_MAX, HASH_BYTES, Frame

FRAMES_MAX = 1 << 20
INDEX_BYTES_MAX = 1 << 28
_FRAME_OVERHEAD = 1024


@dataclass(frozen=True)
class FrameTable:
    """Where each frame is and what it must hash to. Arrays are read-only by convention; sizes in bytes.

    `contents`: hashes of what the frames hold, unpacked; None in files of version 1. `level`: zstd's, 0 if not known.
    """

    compressed: NDArray[np.uint32]
    raw: NDArray[np.uint32]
    hashes: NDArray[np.uint8]  # shape (n, 32)
    contents: NDArray[np.uint8] | None = None  # shape (n, 32)
    level: int = 0

    @property
    def count(self) -> int:
        """How many frames."""
        return len(self.compressed)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Start of each frame in the file, and the end of the last: n + 1 numbers."""
        return np.concatenate(([0], np.cumsum(self.compressed, dtype=np.int64)))

    @cached_property
    def raw_offsets(self) -> NDArray[np.int64]:
        """Start of each frame's content in the unpacked file, and its end: n + 1 numbers."""
        return np.concatenate(([0], np.cumsum(self.raw, dtype=np.int64)))


def check_sizes(compressed: NDArray[np.uint32], raw: NDArray[np.uint32], name: str) -> None:
    """Raise Corrupt for sizes that no frame has: whoever reads one takes memory for what they say. zstd makes nothing
    larger by more than a 256th and some bytes."""
    if len(raw) and int(raw.max()) > FRAME_RAW_BYTES_MAX:
        raise Corrupt(f"{name}: a frame claims {int(raw.max())} bytes, over the cap", blob=name)
    if (compressed > raw.astype(np.int64) * 129 // 128 + _FRAME_OVERHEAD).any():
        raise Corrupt(f"{name}: a frame claims to be larger than its content", blob=name)


def table_of(frames: list[Frame], *, level: int) -> FrameTable:
    """Return the table of these frames in this order, compressed at `level`."""
    return FrameTable(
        np.array([frame.stored_bytes for frame in frames], np.uint32),
        np.array([frame.raw_bytes for frame in frames], np.uint32),
        _stack(frame.hash for frame in frames),
        _stack(frame.content for frame in frames),
        level,
    )


def _stack(hashes: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)
