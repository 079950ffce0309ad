"""A blob store in memory: for tests and throw-away runs. Same contract and same suite as the durable ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from time import time

from recess.blobs.contract import BlobInfo, Bytes, PieceSource, Ranges, check_key, pieces
from recess.errors import Corrupt, NotFound, OutOfSpace


class MemoryBlobs:
    """Blobs in a dict. `capacity_bytes`: beyond it `put` raises OutOfSpace, like a full disk (None: no limit)."""

    def __init__(self, *, capacity_bytes: int | None = None, now: Callable[[], float] = time) -> None:
        self.capacity_bytes = capacity_bytes
        self._now = now
        self._blobs: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        check_key(key)
        content = b"".join(pieces(data))
        with self._lock:
            old = self._blobs.get(key)
            if old is not None:
                self._blobs[key] = (old[0], self._now())
                return False
            used = sum(len(blob) for blob, _ in self._blobs.values())
            if self.capacity_bytes is not None and used + len(content) > self.capacity_bytes:
                raise OutOfSpace(f"no space for blob {key}", hint="raise capacity_bytes or delete blobs")
            self._blobs[key] = (content, self._now())
            return True

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`."""
        check_key(key)
        return self.put(key, list(source()))

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        check_key(key)
        with self._lock:
            old = self._blobs.get(key)
            if old is not None:
                self._blobs[key] = (old[0], self._now())
            return old is not None

    def _find(self, key: str) -> tuple[bytes, float]:
        check_key(key)
        with self._lock:
            found = self._blobs.get(key)
        if found is None:
            raise NotFound(f"no such blob: {key}", kind="blob", ref=key)
        return found

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        content, _ = self._find(key)
        if len(content) > max_bytes:
            raise Corrupt(f"blob {key} holds {len(content)} bytes, at most {max_bytes} were expected", blob=key)
        return content

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        content, _ = self._find(key)
        if offset < 0 or length < 0 or offset + length > len(content):
            raise Corrupt(f"blob {key} ends before byte {offset + length}", blob=key)
        return content[offset : offset + length]

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        self._find(key)
        return [self.get_range(key, offset, length) for offset, length in ranges]

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        content, modified_s = self._find(key)
        return BlobInfo(key, len(content), modified_s)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        check_key(key)
        with self._lock:
            return key in self._blobs

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`."""
        check_key(key)
        with self._lock:
            return self._blobs.pop(key, None) is not None

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`."""
        with self._lock:
            infos = [BlobInfo(k, len(c), t) for k, (c, t) in self._blobs.items() if k.startswith(prefix)]
        yield from infos

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`: a put here leaves nothing behind."""
        return 0
