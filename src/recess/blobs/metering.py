"""Counting what goes to and comes from a store: calls and bytes, for reports and benchmarks. It changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

from recess.blobs.contract import BlobInfo, BlobStore, Bytes, PieceSource, Ranges, pieces
from recess.blobs.draft import Draft, draft_of
from recess.blobs.wrapped import WrappedBlobs


@dataclass(frozen=True)
class Traffic:
    """Totals. A call of `get_ranges` is one read; asking, listing and deleting are `other_calls`. Sizes in bytes."""

    read_calls: int = 0
    read_bytes: int = 0
    written_calls: int = 0
    written_bytes: int = 0
    other_calls: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Return what came since an earlier reading."""
        return Traffic(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class MeteredBlobs(WrappedBlobs):
    """`inner` with a meter. Bytes count when they were moved: a put that found its blob there moved none."""

    def __init__(self, inner: BlobStore) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._traffic = Traffic()

    @property
    def traffic(self) -> Traffic:
        """What was moved so far; subtract two readings to measure one act."""
        with self._lock:
            return self._traffic

    def _add(self, more: Traffic) -> None:
        with self._lock:
            self._traffic = Traffic(*(getattr(self._traffic, f.name) + getattr(more, f.name) for f in fields(more)))

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        added = self._inner.put(key, data)
        size = sum(view.nbytes for view in pieces(data)) if added else 0
        self._add(Traffic(written_calls=1, written_bytes=size))
        return added

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`."""
        size = 0

        def counted() -> Iterator[Bytes]:
            nonlocal size
            size = 0
            for piece in source():
                size += memoryview(piece).nbytes
                yield piece

        added = self._inner.put_stream(key, counted)
        self._add(Traffic(written_calls=1, written_bytes=size if added else 0))
        return added

    def draft(self) -> Draft:
        """See `Drafting.draft`."""
        return _MeteredDraft(draft_of(self._inner), self._add)

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        self._add(Traffic(other_calls=1))
        return self._inner.touch(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        data = self._inner.get(key, max_bytes=max_bytes)
        self._add(Traffic(read_calls=1, read_bytes=len(data)))
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        data = self._inner.get_range(key, offset, length)
        self._add(Traffic(read_calls=1, read_bytes=len(data)))
        return data

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        found = self._inner.get_ranges(key, ranges)
        self._add(Traffic(read_calls=1, read_bytes=sum(map(len, found))))
        return found

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        self._add(Traffic(other_calls=1))
        return self._inner.stat(key)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        self._add(Traffic(other_calls=1))
        return self._inner.exists(key)

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`."""
        self._add(Traffic(other_calls=1))
        return self._inner.delete(key)

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`."""
        self._add(Traffic(other_calls=1))
        return self._inner.list_blobs(prefix)

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`."""
        self._add(Traffic(other_calls=1))
        return self._inner.clean(before_s=before_s)


class _MeteredDraft:
    """A draft that counts once it is put."""

    def __init__(self, inner: Draft, add: Callable[[Traffic], None]) -> None:
        self._inner = inner
        self._add = add
        self._bytes = 0

    def write(self, data: Bytes) -> None:
        """See `Draft.write`."""
        self._inner.write(data)
        self._bytes += memoryview(data).nbytes

    def flush(self) -> None:
        """See `Draft.flush`."""
        self._inner.flush()

    def put(self, key: str) -> bool:
        """See `Draft.put`."""
        added = self._inner.put(key)
        self._add(Traffic(written_calls=1, written_bytes=self._bytes if added else 0))
        return added

    def drop(self) -> None:
        """See `Draft.drop`."""
        self._inner.drop()
