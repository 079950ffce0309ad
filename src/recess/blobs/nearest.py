"""A store with copies of some of its blobs nearer by: read from there what is there, ask the store for the rest.

Unlike `caching` it makes no copies and owns no folder, so a short-lived process may have one beside the owner of the
copies, who may remove one at any time: the store then has it. Everything but reading goes to the store alone.
"""

from __future__ import annotations

from recess.blobs.contract import BlobInfo, BlobStore, Ranges
from recess.blobs.wrapped import WrappedBlobs
from recess.errors import Corrupt, NotFound, Unavailable


class NearestBlobs(WrappedBlobs):
    """`copies` before `inner`. A copy that cannot be read is no copy."""

    def __init__(self, copies: BlobStore, inner: BlobStore) -> None:
        super().__init__(inner)
        self._copies = copies

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        try:
            return self._copies.get(key, max_bytes=max_bytes)
        except (NotFound, Corrupt, Unavailable):
            return self._inner.get(key, max_bytes=max_bytes)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        try:
            return self._copies.get_range(key, offset, length)
        except (NotFound, Corrupt, Unavailable):
            return self._inner.get_range(key, offset, length)

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        try:
            return self._copies.get_ranges(key, ranges)
        except (NotFound, Corrupt, Unavailable):
            return self._inner.get_ranges(key, ranges)

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        try:
            return self._copies.stat(key)
        except (NotFound, Unavailable):
            return self._inner.stat(key)
