"""The 4 KiB blocks of a file (a root image, a kernel) as a page source: which block holds these bytes?

Satisfies `recess.snapshots.contract.PageSource` by shape; it must not import it. A snapshot leaves out every page
that this module finds, so equality is always decided by comparing bytes: the index only proposes.

Index file `NAME.pages`, little-endian: magic "RECESSPX", u32 version, u32 count, u64 file size, 32 bytes hash of the
file, count x u64 page hashes (ascending), count x u32 block numbers, BLAKE3-256 of all before. It is a cache: damaged,
old or missing, it is built again (0.3 s for 200 MB), and if it cannot be stored it is used from memory.
"""

from __future__ import annotations

import contextlib
import mmap
import secrets
import struct
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from recess.errors import BadInput, Corrupt

PAGE = 4096
_WORDS = PAGE // 8
_HEAD = struct.Struct("<8sIIQ32s")
_MAGIC = b"RECESSPX"
_VERSION = 1
_BATCH = 256  # pages hashed at a time: 1 MiB, stays in the second-level cache
_MAX_BLOCKS = 1 << 28  # 1 TiB


def _hash_keys() -> NDArray[np.uint64]:
    """Return the fixed odd multipliers of the page hash (splitmix64 from seed 0)."""
    index = np.arange(1, _WORDS + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


_KEYS = _hash_keys()


def page_hashes(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one 64-bit hash per row of a (n, 512) array: the sum of words times fixed odd keys, mod 2^64."""
    out = np.empty(len(words), dtype=np.uint64)
    for start in range(0, len(words), _BATCH):
        part = words[start : start + _BATCH]
        np.matmul(part, _KEYS, out=out[start : start + len(part)])
    return out


class FilePages:
    """Blocks of one immutable file, found by content. Safe to share between threads."""

    def __init__(
        self, mapping: mmap.mmap, source_hash: str, hashes: NDArray[np.uint64], blocks: NDArray[np.uint32]
    ) -> None:
        self._mapping = mapping
        self._hash = source_hash
        self._hashes = hashes
        self._numbers = blocks
        self._view = memoryview(mapping)
        self._count = len(mapping) // PAGE
        self._words = np.frombuffer(mapping, dtype=np.uint64, count=self._count * _WORDS).reshape(-1, _WORDS)

    @classmethod
    def open(cls, path: Path, source_hash: str) -> FilePages:
        """Map a file and load its index, building that first where needed. A last partial block is left out.

        `source_hash` is BLAKE3-256 hex of the file; it is not checked here. Raises BadInput for an empty file.
        """
        with path.open("rb") as handle:
            size = path.stat().st_size
            if size < PAGE or size // PAGE > _MAX_BLOCKS:
                raise BadInput(f"{path} cannot be a page source: {size} bytes")
            mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        index_path = path.with_name(path.name + ".pages")
        index = _load(index_path, size, source_hash)
        if index is None:
            index = _build(mapping)
            _store(index_path, size, source_hash, *index)
        return cls(mapping, source_hash, *index)

    @property
    def source_hash(self) -> str:
        """BLAKE3-256 hex of the whole file."""
        return self._hash

    @property
    def block_count(self) -> int:
        """How many whole blocks the file has."""
        return self._count

    def lookup_many(self, pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return, per page of an (n, 4096) array, the number of a block with equal bytes, or -1.

        Pages of zeros are never found: they cost nothing elsewhere.
        """
        found = np.full(len(pages), -1, dtype=np.int64)
        if not len(pages) or not len(self._hashes):
            return found
        words = np.ascontiguousarray(pages).view(np.uint64)
        hashes = page_hashes(words)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        rows = np.nonzero(self._hashes[places] == hashes)[0]
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            blocks = self._numbers[places[part]]
            equal = (self._words[blocks] == words[part]).all(axis=1)
            found[part[equal]] = blocks[equal]
        return found

    def read_block(self, block: int) -> memoryview:
        """Return 4096 bytes of the file. Raises Corrupt if there is no such block."""
        if not 0 <= block < self._count:
            raise Corrupt(f"block {block} is outside the source {self._hash[:12]} of {self._count} blocks")
        return self._view[block * PAGE : (block + 1) * PAGE]

    def close(self) -> None:
        """Drop this object's references; the mapping goes when the last block handed out goes. May be called twice."""
        self._words = np.empty((0, _WORDS), dtype=np.uint64)
        self._count = 0
        self._hashes = self._hashes[:0]
        self._view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()


def _build(mapping: mmap.mmap) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    words = np.frombuffer(mapping, dtype=np.uint64, count=len(mapping) // PAGE * _WORDS).reshape(-1, _WORDS)
    hashes = page_hashes(words)
    unique, first = np.unique(hashes, return_index=True)
    keep = unique != 0  # zeros hash to 0
    return unique[keep], first[keep].astype(np.uint32)


def _store(path: Path, size: int, source_hash: str, hashes: NDArray[np.uint64], blocks: NDArray[np.uint32]) -> None:
    body = _HEAD.pack(_MAGIC, _VERSION, len(hashes), size, bytes.fromhex(source_hash))
    body += hashes.astype("<u8").tobytes() + blocks.astype("<u4").tobytes()
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # a read-only or full disk: the index in memory serves
        try:
            temp.write_bytes(body + blake3(body).digest())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)


def _load(path: Path, size: int, source_hash: str) -> tuple[NDArray[np.uint64], NDArray[np.uint32]] | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _HEAD.size + 32 or blake3(data[:-32]).digest() != data[-32:]:
        return None
    magic, version, count, of_size, of_hash = _HEAD.unpack_from(data)
    if (magic, version, of_size, of_hash.hex()) != (_MAGIC, _VERSION, size, source_hash):
        return None
    if len(data) != _HEAD.size + count * 12 + 32:
        return None
    hashes = np.frombuffer(data, dtype="<u8", count=count, offset=_HEAD.size)
    blocks = np.frombuffer(data, dtype="<u4", count=count, offset=_HEAD.size + count * 8)
    if count and int(blocks.max()) >= size // PAGE:
        return None
    return hashes, blocks
