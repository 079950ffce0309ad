"""Version 1 of our index frame, read only (today's is `index_v2`): sizes and hashes of all frames, and extra bytes.

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

import numpy as np

from recess.errors import Corrupt
from recess.frames.table import FRAMES_MAX, FrameTable, check_sizes
from recess.frames.zstd import HASH_BYTES

VERSION = 1
_HEAD = struct.Struct("<8sHH4sII")


def decode_index(data: bytes, kind: bytes, name: str) -> tuple[FrameTable, bytes]:
    """Return table and extra of an index whose head says version 1. Raises Corrupt: every count is checked."""
    _, _, reserved, found_kind, count, extra_bytes = _HEAD.unpack_from(data)
    if reserved != 0 or found_kind != kind or count > FRAMES_MAX:
        raise Corrupt(f"{name}: index header makes no sense", blob=name)
    if len(data) != _HEAD.size + count * (8 + HASH_BYTES) + extra_bytes:
        raise Corrupt(f"{name}: index size does not match its counts", blob=name)
    at = _HEAD.size
    compressed = np.frombuffer(data, "<u4", count, at)
    raw = np.frombuffer(data, "<u4", count, at + 4 * count)
    hashes = np.frombuffer(data, np.uint8, count * HASH_BYTES, at + 8 * count).reshape(-1, HASH_BYTES)
    check_sizes(compressed, raw, name)
    return FrameTable(compressed, raw, hashes), data[len(data) - extra_bytes :]
