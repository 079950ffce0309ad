"""A blob that is written while it is still being made: its key, a hash of all of it, is known only at its end.

A store of files has most of it on the disk by then, so that the last fsync finds little left to wait for: writing 10 MB
takes as long as compressing them, and the two can be done at the same time. Other stores get the whole at the end.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from recess.blobs.contract import BlobStore, Bytes


class Draft(Protocol):
    """One blob on its way. Used by one thread at a time."""

    def write(self, data: Bytes) -> None:
        """Append bytes, which may change afterwards. Raises OutOfSpace, Unavailable; then only `drop` is of use."""
        ...

    def flush(self) -> None:
        """Wait until about all that was written has reached the disk: what others fsync then waits for little of it. Promises
        nothing. May be called beside a `write`."""
        ...

    def put(self, key: str) -> bool:
        """End it as the blob `key`; promises, answer and errors are those of `BlobStore.put`. Once only."""
        ...

    def drop(self) -> None:
        """Forget it, unless it was put. May be called twice."""
        ...


@runtime_checkable
class Drafting(Protocol):
    """A store that takes a blob piece by piece."""

    def draft(self) -> Draft:
        """Begin a blob. Raises OutOfSpace, Unavailable."""
        ...


def draft_of(blobs: BlobStore) -> Draft:
    """Begin a blob in any store."""
    return blobs.draft() if isinstance(blobs, Drafting) else _Held(blobs)


class _Held:
    """A draft held in memory: for stores that take a blob whole."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._pieces: list[bytes] = []

    def write(self, data: Bytes) -> None:
        """See `Draft.write`."""
        self._pieces.append(bytes(data))

    def flush(self) -> None:
        """See `Draft.flush`: nothing is on its way yet."""

    def put(self, key: str) -> bool:
        """See `Draft.put`."""
        return self._blobs.put(key, self._pieces)

    def drop(self) -> None:
        """See `Draft.drop`."""
        self._pieces = []
