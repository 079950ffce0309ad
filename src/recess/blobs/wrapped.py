"""The plain forwarding that a wrapper of a store begins with: subclass it and override what is special. It adds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recess.blobs.contract import BlobInfo, BlobStore, Bytes, PieceSource, Ranges


class WrappedBlobs:
    """`inner` as it is."""

    def __init__(self, inner: BlobStore) -> None:
        self._inner = inner

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        return self._inner.put(key, data)

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`."""
        return self._inner.put_stream(key, source)

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        return self._inner.touch(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        return self._inner.get(key, max_bytes=max_bytes)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self._inner.get_range(key, offset, length)

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        return self._inner.get_ranges(key, ranges)

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        return self._inner.stat(key)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        return self._inner.exists(key)

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`."""
        return self._inner.delete(key)

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`."""
        return self._inner.list_blobs(prefix)

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`."""
        return self._inner.clean(before_s=before_s)
