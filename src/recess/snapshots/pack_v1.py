"""Version 1 of a page-map pack: all new nodes of one snapshot's page maps in one file of `recess.frames`.

One file and not one per node: a snapshot would pay thousands of fsyncs. Content: the nodes, one after the other, in
the order of their hashes. Extra bytes of the index (little-endian): u16 version = 1, u16 zero, u32 node count n,
32 bytes hash[n] (ascending), u32 size[n].
"""

from __future__ import annotations

import struct

import numpy as np

from recess.errors import Corrupt, Incompatible
from recess.frames import SeekableFile, SeekableReader, WorkPool, build_seekable

KIND = b"PMAP"
VERSION = 1
RAW_BYTES_MAX = 1 << 28
_HEAD = struct.Struct("<HHI")
_HASH = 32


def build_pack(nodes: dict[bytes, bytes], *, frame_bytes: int, level: int, pool: WorkPool) -> SeekableFile:
    """Return the pack that holds these nodes (by hash)."""
    order = sorted(nodes)
    sizes = np.array([len(nodes[digest]) for digest in order], "<u4")
    extra = _HEAD.pack(VERSION, 0, len(order)) + b"".join(order) + sizes.tobytes()
    content = memoryview(b"".join(nodes[digest] for digest in order))
    count = -(-len(content) // frame_bytes)
    return build_seekable(
        KIND, count, lambda i: content[i * frame_bytes : (i + 1) * frame_bytes], extra, level=level, pool=pool
    )


def pack_hashes(reader: SeekableReader) -> tuple[list[bytes], list[int]]:
    """Return hashes and sizes of a pack's nodes, in file order. Raises Corrupt, Incompatible."""
    extra, name = reader.extra, reader.name
    if len(extra) < _HEAD.size:
        raise Corrupt(f"{name}: no directory", blob=name)
    version, zero, count = _HEAD.unpack_from(extra)
    if version != VERSION:
        raise Incompatible(f"{name}: pack version {version} is unknown here", reasons=[f"pack version {version}"])
    if zero or len(extra) != _HEAD.size + count * (_HASH + 4):
        raise Corrupt(f"{name}: directory size does not match its count", blob=name)
    end = _HEAD.size + count * _HASH
    hashes = [extra[at : at + _HASH] for at in range(_HEAD.size, end, _HASH)]
    sizes = np.frombuffer(extra, "<u4", count, end)
    if int(sizes.sum(dtype=np.int64)) != int(reader.table.raw_offsets[-1]):
        raise Corrupt(f"{name}: directory does not match its content", blob=name)
    return hashes, sizes.tolist()


def read_pack(reader: SeekableReader, pool: WorkPool) -> dict[bytes, bytes]:
    """Return a pack's nodes by the hash its directory claims; who uses a node checks that hash."""
    hashes, sizes = pack_hashes(reader)
    content = reader.raw(pool, max_bytes=RAW_BYTES_MAX)
    nodes, at = {}, 0
    for digest, size in zip(hashes, sizes, strict=True):
        nodes[digest] = content[at : at + size]
        at += size
    return nodes
