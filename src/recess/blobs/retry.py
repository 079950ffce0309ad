"""Trying again: a blob store whose passing failures are waited out, with a cap on tries and on time, and full jitter.

Only `Unavailable` with `details["retryable"]` is tried again: what is missing, damaged or refused is so the second time,
too. The waits are a pure function of the policy and of random numbers; time and waiting are injected. It must know
nothing of what is behind it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from recess.blobs.contract import BlobInfo, BlobStore, Bytes, PieceSource, Ranges
from recess.errors import Unavailable

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """At most `tries` calls and no new one after `total_s`; waits grow from `first_s` twofold up to `most_s`."""

    tries: int = 6
    first_s: float = 0.1
    most_s: float = 5.0
    total_s: float = 30.0


def wait_before(policy: RetryPolicy, tried: int, chance: float) -> float:
    """Return how long to wait before the next try, after `tried` of them; `chance` from 0 to 1 is the jitter.

    Full jitter: clients that were refused together must not come back together.
    """
    ceiling: float = min(policy.most_s, policy.first_s * 2.0 ** min(tried - 1, 60))
    return ceiling * chance


class RetryingBlobs:
    """`inner` with patience. Gives up with the last error, which then says how often it was tried."""

    def __init__(
        self,
        inner: BlobStore,
        policy: RetryPolicy | None = None,
        *,
        wait: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._inner = inner
        self._policy = policy or RetryPolicy()
        self._wait = wait
        self._monotonic = monotonic
        self._chance = chance

    def _try(self, call: Callable[[], T]) -> T:
        began = self._monotonic()
        tried = 0
        while True:
            tried += 1
            try:
                return call()
            except Unavailable as exc:
                pause = wait_before(self._policy, tried, self._chance())
                late = self._monotonic() + pause - began > self._policy.total_s
                if not exc.details.get("retryable") or tried >= self._policy.tries or late:
                    exc.details["tries"] = tried
                    raise
            self._wait(pause)

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        return self._try(lambda: self._inner.put(key, data))

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`: each try takes the stream from its beginning."""
        return self._try(lambda: self._inner.put_stream(key, source))

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        return self._try(lambda: self._inner.touch(key))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        return self._try(lambda: self._inner.get(key, max_bytes=max_bytes))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self._try(lambda: self._inner.get_range(key, offset, length))

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        return self._try(lambda: self._inner.get_ranges(key, ranges))

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        return self._try(lambda: self._inner.stat(key))

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        return self._try(lambda: self._inner.exists(key))

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`. A try that followed a lost answer may say False of what its forerunner removed."""
        return self._try(lambda: self._inner.delete(key))

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`. A listing that breaks off is begun again; what was given is not given twice."""
        given: set[str] = set()
        listing = self._inner.list_blobs(prefix)

        def step() -> BlobInfo | None:
            nonlocal listing
            try:
                return next((info for info in listing if info.key not in given), None)
            except Unavailable:
                listing = self._inner.list_blobs(prefix)  # a generator that raised is at its end
                raise

        while (info := self._try(step)) is not None:  # the cap on tries is one of tries without progress
            given.add(info.key)
            yield info

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`."""
        return self._try(lambda: self._inner.clean(before_s=before_s))
