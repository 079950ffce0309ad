"""Bytes by key: what every blob store promises (memory, local files, S3-compatible; one conformance suite for all).

A blob is written once, whole, and never changed; whoever needs another content uses another key (most keys are
hashes). The store must know nothing of what the bytes mean. Everything is synchronous; a store is safe to use from
several threads at once. Errors: `NotFound` (no such key), `OutOfSpace` (nothing was added), `Corrupt` (a blob is
shorter than asked for), `BadInput` (a key that is not one): none of them is worth a blind retry. `Unavailable`: the
store cannot be reached or used; with `details["retryable"]` true the same call may succeed a moment later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from recess.errors import BadInput

Bytes = bytes | bytearray | memoryview
PieceSource = Callable[[], Iterator[Bytes]]  # called anew for every attempt
Ranges = Sequence[tuple[int, int]]  # (offset, length) each

KEY_CHARS_MAX = 200
PIECE_BYTES = 8 << 20
_KEY = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,127}(/[a-z0-9][a-z0-9_.\-]{0,127}){0,3}")


@dataclass(frozen=True)
class BlobInfo:
    """One blob. `modified_s`: wall seconds of its last `put`, also of one that found it there already."""

    key: str
    size_bytes: int
    modified_s: float


class BlobStore(Protocol):
    """A flat map from key to bytes."""

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """Store `data` (pieces are joined) unless the key exists; durable and visible at once when this returns.

        No key may be a folder of another (`a` beside `a/b`): stores of files refuse it with BadInput.
        Returns True if this call added it, False if it was there: then nothing is compared and only its time is
        renewed, which keeps a concurrent sweep with a grace period away from it. May be called twice.
        """
        ...

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """Like `put`, for content that is larger than memory: the pieces of `source()` in their order.

        The source may be called several times or not at all. What it raises is passed on, and nothing is stored then:
        so a source can verify what it yields, and refuse at the very end.
        """
        ...

    def touch(self, key: str) -> bool:
        """Renew the time of a blob, as `put` does for one that is there; False if it is not there."""
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """Return the whole blob. Raises NotFound; Corrupt if it holds more than `max_bytes` (nothing is read then)."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`. There are no short reads: Corrupt if the blob ends before."""
        ...

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """Return the bytes of each (offset, length), in the order asked for; as exact as `get_range`.

        A store that pays by the request joins ranges that lie near each other.
        """
        ...

    def stat(self, key: str) -> BlobInfo:
        """Return size and time. Raises NotFound."""
        ...

    def exists(self, key: str) -> bool:
        """Tell whether the key is there."""
        ...

    def delete(self, key: str) -> bool:
        """Remove it, durably; False if it was not there. May be called twice."""
        ...

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """Yield all blobs whose key starts with `prefix`, in any order; those that come or go meanwhile may miss."""
        ...

    def clean(self, *, before_s: float) -> int:
        """Remove what interrupted puts left behind and that is older than this wall time; return how many."""
        ...


def read_pieces(blobs: BlobStore, key: str, size_bytes: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield a blob of this size piece by piece: as much memory as one piece, and a retry repeats only one."""
    for offset in range(0, size_bytes, piece_bytes):
        yield blobs.get_range(key, offset, min(piece_bytes, size_bytes - offset))


def check_key(key: str) -> str:
    """Return the key. Raises BadInput unless it is 1-4 parts of `a-z 0-9 _ . -`, none starting with a dot."""
    if len(key) > KEY_CHARS_MAX or _KEY.fullmatch(key) is None:
        raise BadInput(
            f"not a blob key: {key[:80]!r}", hint="lower-case letters, digits, _ . - in 1-4 parts joined by /"
        )
    return key


def pieces(data: Bytes | Sequence[Bytes]) -> list[memoryview]:
    """Return `data` as a list of non-empty flat byte views, without a copy."""
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    views = [memoryview(part) for part in parts]
    return [view.cast("B") if view.format != "B" or view.ndim != 1 else view for view in views if view.nbytes]
