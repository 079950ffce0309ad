"""A folder in front of a remote store: blobs come once, verified, and are read from the disk afterwards.

Blobs never change, so a copy is never stale; the remote store stays the truth for what exists, what is new and what is
gone. The first read of a blob fetches all of it (if it is not too large), through a check that the caller gives: damaged
or cut bytes never become a copy. The folder is bounded: what was not read for longest goes first.

Crash-safe by what it is made of: a copy appears whole (`local.put_stream`) or not at all, and which copies there are is
read from the folder at the start. A disk that is full or broken only makes reads slower. This module must know nothing
of what the bytes mean.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from recess.blobs.contract import BlobInfo, BlobStore, Bytes, PieceSource, Ranges, check_key, pieces, read_pieces
from recess.blobs.local import LocalBlobs
from recess.blobs.wrapped import WrappedBlobs
from recess.errors import Corrupt, NotFound, OutOfSpace, Unavailable

_REMEMBERED = 10_000
ReadRange = Callable[[int, int], bytes]
Check = Callable[[str, int, ReadRange, Iterator[bytes]], Iterator[bytes]]
"""(key, size, ranged read, pieces) -> the same bytes in pieces; raises Corrupt before the last if they are not the key's."""


@dataclass(frozen=True)
class CacheState:
    """What the folder holds, and how often it helped. A miss is a read that went to the remote store."""

    blobs: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int


class CachingBlobs:
    """`remote` with copies in `local`, of the keys that `kept` names.

    `whole_max_bytes`: larger blobs are read by ranges and not kept (0: all are).
    """

    def __init__(
        self,
        remote: BlobStore,
        local: LocalBlobs,
        check: Check,
        *,
        max_bytes: int,
        whole_max_bytes: int,
        kept: Callable[[str], bool] = lambda _key: True,
    ) -> None:
        self._remote = remote
        self._local = local
        self._check = check
        self._kept = kept
        self._max_bytes = max_bytes
        self._whole_max_bytes = min(whole_max_bytes, max_bytes)
        self._lock = threading.Lock()
        self._filling: dict[str, threading.Lock] = {}
        self._too_large: set[str] = set()
        self._hits = self._misses = 0
        local.clean(before_s=float("inf"))  # the folder is this process's alone
        found = sorted(local.list_blobs(), key=lambda info: info.modified_s)
        self._held = OrderedDict((info.key, info.size_bytes) for info in found)
        self._held_bytes = sum(self._held.values())
        self._make_room(0)

    @property
    def state(self) -> CacheState:
        """Return what is held at this moment."""
        with self._lock:
            return CacheState(len(self._held), self._held_bytes, self._max_bytes, self._hits, self._misses)

    def drop(self, key: str) -> bool:
        """Forget the copy of a blob, because it turned out damaged; False if there was none. It is fetched anew."""
        self._forget(key)
        return self._local.delete(key)

    def empty(self) -> int:
        """Give all copies up; return their bytes. Whoever reads one has it open, or reads remotely."""
        with self._lock:
            victims, freed = list(self._held), self._held_bytes
            self._held.clear()
            self._held_bytes = 0
        for key in victims:
            self._local.delete(key)
        return freed

    def _forget(self, key: str) -> None:
        """There is no copy any more: it made room for others, or somebody emptied the folder."""
        with self._lock:
            self._held_bytes -= self._held.pop(key, 0)

    def missing_bytes(self, sizes: Sequence[tuple[str, int]]) -> int:
        """Return how many bytes of these (key, size) are not here: what a reader of them all would wait for."""
        with self._lock:
            return sum(size for key, size in sizes if key not in self._held)

    # --- copies ------------------------------------------------------------------------------------------------

    def _hit(self, key: str) -> bool:
        with self._lock:
            if key not in self._held:
                self._misses += 1
                return False
            self._held.move_to_end(key)
            self._hits += 1
            return True

    def _copy(self, key: str) -> bool:
        """See that there is a copy; False if the blob is not to be kept or cannot be. Raises NotFound, Corrupt, ..."""
        if not self._kept(check_key(key)):
            return False
        if self._hit(key):
            return True
        if key in self._too_large:
            return False
        with self._lock:
            gate = self._filling.setdefault(key, threading.Lock())
        with gate:  # readers of many threads want the same blob at once: one fetches it
            try:
                with self._lock:
                    if key in self._held:
                        return True
                return self._fetch(key)
            finally:
                with self._lock:
                    self._filling.pop(key, None)

    def _fetch(self, key: str) -> bool:
        size = self._remote.stat(key).size_bytes
        if size > self._whole_max_bytes:
            with self._lock:
                if len(self._too_large) >= _REMEMBERED:
                    self._too_large.clear()
                self._too_large.add(key)  # each of its ranges would ask for its size again
            return False

        def read(offset: int, length: int) -> bytes:
            return self._remote.get_range(key, offset, length)

        return self._keep(key, size, lambda: self._check(key, size, read, read_pieces(self._remote, key, size)))

    def _keep(self, key: str, size: int, source: PieceSource) -> bool:
        """Store a copy; False if the disk refuses. What the source raises is passed on."""
        self._make_room(size)
        failed: list[Exception] = []

        def watched() -> Iterator[Bytes]:
            try:
                yield from source()
            except Exception as exc:
                failed.append(exc)
                raise

        try:
            self._local.put_stream(key, watched)
        except (OutOfSpace, Unavailable):
            if failed:
                raise
            return False
        with self._lock:
            if key not in self._held:
                self._held[key] = size
                self._held_bytes += size
        self._make_room(0)  # others may have come in meanwhile
        return True

    def _make_room(self, size: int) -> None:
        """Delete the copies unused for longest until `size` more bytes fit. Who reads one has it open, or reads remotely."""
        victims = []
        with self._lock:
            while self._held and self._held_bytes + size > self._max_bytes:
                key, held = self._held.popitem(last=False)
                self._held_bytes -= held
                victims.append(key)
        for key in victims:
            with contextlib.suppress(Unavailable):
                self._local.delete(key)

    # --- the contract ------------------------------------------------------------------------------------------

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`: durable when the remote store has it; what was new is kept here, too."""
        added = self._remote.put(key, data)
        size = sum(view.nbytes for view in pieces(data))
        if added and size <= self._whole_max_bytes and self._kept(key):
            self._keep(key, size, lambda: iter(pieces(data)))
        return added

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`. It is not kept here until it is read."""
        return self._remote.put_stream(key, source)

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        return self._remote.touch(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        if self._copy(key):
            try:
                return self._local.get(key, max_bytes=max_bytes)
            except NotFound:
                self._forget(key)
        return self._remote.get(key, max_bytes=max_bytes)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self.get_ranges(key, [(offset, length)])[0]

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        if self._copy(key):
            try:
                return self._local.get_ranges(key, ranges)
            except NotFound:
                self._forget(key)
        return self._remote.get_ranges(key, ranges)

    def peek_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """Read ranges of a copy if there is one, else of the remote store, without making a copy."""
        with self._lock:
            held = key in self._held
        if held and self._hit(key):
            with contextlib.suppress(NotFound):  # it made room for others just now
                return self._local.get_ranges(key, ranges)
        return self._remote.get_ranges(key, ranges)

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        return self._remote.stat(key)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        return self._remote.exists(key)

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`: the copy goes first."""
        check_key(key)
        self.drop(key)
        return self._remote.delete(key)

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`."""
        return self._remote.list_blobs(prefix)

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`."""
        return self._local.clean(before_s=before_s) + self._remote.clean(before_s=before_s)


class SparingBlobs(WrappedBlobs):
    """A cache for who reads little of a few large blobs, those whose key is `large`: of them no copies are made."""

    def __init__(self, cache: CachingBlobs, large: Callable[[str], bool]) -> None:
        super().__init__(cache)
        self._cache = cache
        self._large = large

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self.get_ranges(key, [(offset, length)])[0]

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        return self._cache.peek_ranges(key, ranges) if self._large(key) else self._cache.get_ranges(key, ranges)


def unchecked(key: str, size_bytes: int, read: ReadRange, source: Iterator[bytes]) -> Iterator[bytes]:
    """A `Check` that only counts: for stores whose keys are no hashes. Raises Corrupt if the size is wrong."""
    seen = 0
    for piece in source:
        seen += len(piece)
        yield piece
    if seen != size_bytes:
        raise Corrupt(f"blob {key} has {seen} bytes, not {size_bytes}", blob=key)
