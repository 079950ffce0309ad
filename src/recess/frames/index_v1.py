"""Version 1 of our index frame: sizes and hashes of all frames, and the user's own extra bytes.

All numbers are little-endian:

    0   8   magic "RECESSIX"
    8   2   version = 1
    10  2   zero
    12  4   kind, four ASCII letters: what the extra bytes are ("LAYR", "PMAP", ...)
    16  4   frame count n
    20  4   size of the extra bytes e
    24  4n  compressed size of each frame
        4n  content size of each frame
        32n BLAKE3-256 of each compressed frame
        e   extra

The BLAKE3-256 of all this names the file: it covers every content byte, by way of the frames' hashes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recess.errors import Corrupt, Incompatible
from recess.frames.zstd import FRAME_RAW_BYTES_MAX, HASH_BYTES, Frame

VERSION = 1
FRAMES_MAX = 1 << 20
INDEX_BYTES_MAX = 1 << 28
_MAGIC = b"RECESSIX"
_HEAD = struct.Struct("<8sHH4sII")


@dataclass(frozen=True)
class FrameTable:
    """Where each frame is and what it must hash to. Arrays are read-only by convention; sizes in bytes."""

    compressed: NDArray[np.uint32]
    raw: NDArray[np.uint32]
    hashes: NDArray[np.uint8]  # shape (n, 32)

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


def table_of(frames: list[Frame]) -> FrameTable:
    """Return the table of these frames in this order."""
    return FrameTable(
        np.array([len(frame.data) for frame in frames], np.uint32),
        np.array([frame.raw_bytes for frame in frames], np.uint32),
        np.frombuffer(b"".join(frame.hash for frame in frames), np.uint8).reshape(-1, HASH_BYTES),
    )


def encode_index(kind: bytes, table: FrameTable, extra: bytes) -> bytes:
    """Return the index. Raises ValueError beyond the caps, which the reader would refuse."""
    size = _HEAD.size + table.count * (8 + HASH_BYTES) + len(extra)
    if len(kind) != 4 or table.count > FRAMES_MAX or size > INDEX_BYTES_MAX:
        raise ValueError(f"index of {table.count} frames and {size} bytes is over the cap")
    head = _HEAD.pack(_MAGIC, VERSION, 0, kind, table.count, len(extra))
    columns = (table.compressed.astype("<u4"), table.raw.astype("<u4"), table.hashes)
    return b"".join((head, *(column.tobytes() for column in columns), extra))


def decode_index(data: bytes, kind: bytes, name: str) -> tuple[FrameTable, bytes]:
    """Return table and extra. Raises Corrupt (every count is checked against the size), Incompatible (version)."""
    if len(data) < _HEAD.size:
        raise Corrupt(f"{name}: index too short", blob=name)
    magic, version, reserved, found_kind, count, extra_bytes = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise Corrupt(f"{name}: index has a wrong magic", blob=name)
    if version != VERSION:
        raise Incompatible(f"{name}: index version {version} is unknown here", reasons=[f"index version {version}"])
    if reserved != 0 or found_kind != kind or count > FRAMES_MAX:
        raise Corrupt(f"{name}: index header makes no sense", blob=name)
    if len(data) != _HEAD.size + count * (8 + HASH_BYTES) + extra_bytes:
        raise Corrupt(f"{name}: index size does not match its counts", blob=name)
    at = _HEAD.size
    compressed = np.frombuffer(data, "<u4", count, at)
    raw = np.frombuffer(data, "<u4", count, at + 4 * count)
    hashes = np.frombuffer(data, np.uint8, count * HASH_BYTES, at + 8 * count).reshape(-1, HASH_BYTES)
    if count and int(raw.max()) > FRAME_RAW_BYTES_MAX:
        raise Corrupt(f"{name}: a frame claims {int(raw.max())} bytes, over the cap", blob=name)
    return FrameTable(compressed, raw, hashes), data[len(data) - extra_bytes :]
