"""Version 2 of our index frame: sizes, hashes and contents of all frames, and the user's own extra bytes.

All numbers are little-endian:

    0   8   magic "RECESSIX"
    8   2   version = 2
    10  2   level of zstd the frames were compressed at, signed
    12  4   kind, four ASCII letters: what the extra bytes are ("LAYR", "PMAP", ...)
    16  4   frame count n
    20  4   size of the extra bytes e
    24  4n  compressed size of each frame
        4n  content size of each frame
        32n BLAKE3-256 of each compressed frame
        32n BLAKE3-256 of each frame's content
        e   extra

The BLAKE3-256 of all this names the file. Version 1 named a file by its compressed bytes only; since this one covers the
content too, the same file may be stored compressed in another way, and still be proven to be what its name says
(`recoded_v1`).
"""

from __future__ import annotations

import struct

import numpy as np

from recess.errors import Corrupt
from recess.frames.table import FRAMES_MAX, INDEX_BYTES_MAX, FrameTable, check_sizes
from recess.frames.zstd import HASH_BYTES

VERSION = 2
MAGIC = b"RECESSIX"
_HEAD = struct.Struct("<8sHh4sII")


def encode_index(kind: bytes, table: FrameTable, extra: bytes) -> bytes:
    """Return the index. Raises ValueError beyond the caps, which the reader would refuse."""
    size = _HEAD.size + table.count * (8 + 2 * HASH_BYTES) + len(extra)
    if len(kind) != 4 or table.count > FRAMES_MAX or size > INDEX_BYTES_MAX or table.contents is None:
        raise ValueError(f"index of {table.count} frames and {size} bytes is over the cap")
    head = _HEAD.pack(MAGIC, VERSION, table.level, kind, table.count, len(extra))
    columns = (table.compressed.astype("<u4"), table.raw.astype("<u4"), table.hashes, table.contents)
    return b"".join((head, *(column.tobytes() for column in columns), extra))


def decode_index(data: bytes, kind: bytes, name: str) -> tuple[FrameTable, bytes]:
    """Return table and extra of an index whose head says version 2. Raises Corrupt: every count is checked."""
    _, _, level, found_kind, count, extra_bytes = _HEAD.unpack_from(data)
    if found_kind != kind or count > FRAMES_MAX:
        raise Corrupt(f"{name}: index header makes no sense", blob=name)
    if len(data) != _HEAD.size + count * (8 + 2 * HASH_BYTES) + extra_bytes:
        raise Corrupt(f"{name}: index size does not match its counts", blob=name)
    at = _HEAD.size
    compressed = np.frombuffer(data, "<u4", count, at)
    raw = np.frombuffer(data, "<u4", count, at + 4 * count)
    both = np.frombuffer(data, np.uint8, 2 * count * HASH_BYTES, at + 8 * count).reshape(-1, HASH_BYTES)
    check_sizes(compressed, raw, name)
    return FrameTable(compressed, raw, both[:count], both[count:], level), data[len(data) - extra_bytes :]
