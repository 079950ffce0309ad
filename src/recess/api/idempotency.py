"""Idempotency keys of creating calls: the same key again gets the first answer, never a second object.

Kept in memory, the newest 4,096 keys of this server's life; of calls that make a machine the catalog keeps them, too
(`recess.catalog.once`). Messages do not use this: the log keeps their keys for the life of the session.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from recess.errors import BadInput, KeyReused

KEYS_MAX = 4096
KEY_CHARS_MAX = 256


def check_key(key: str) -> str:
    """Return the key. Raises BadInput for one that is too long."""
    if len(key) > KEY_CHARS_MAX:
        raise BadInput(f"an idempotency key is at most {KEY_CHARS_MAX} characters")
    return key


def digest_of(body: object) -> str:
    """Return what stands for all that was asked for."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


class KeyedResults:
    """Runs work once per key; concurrent and later calls with the same key and body share its result."""

    def __init__(self) -> None:
        self._done: OrderedDict[str, tuple[str, asyncio.Future[dict[str, Any]]]] = OrderedDict()

    async def run(self, key: str, body: object, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Return the work's result; a failure is not kept, so that it may be tried again. Raises KeyReused, BadInput.

        `body` is all that was asked for (which call, and of what). Work goes on when its caller is cancelled.
        """
        if not key:
            return await work()
        check_key(key)
        digest = digest_of(body)
        known = self._done.get(key)
        if known is not None:
            if known[0] != digest:
                raise KeyReused(f"idempotency key {key!r} came with another request before")
            return await asyncio.shield(known[1])
        future = asyncio.ensure_future(work())
        self._done[key] = (digest, future)
        future.add_done_callback(lambda done: self._forget_failure(key, done))
        while len(self._done) > KEYS_MAX:
            self._done.popitem(last=False)
        return await asyncio.shield(future)

    def _forget_failure(self, key: str, done: asyncio.Future[dict[str, Any]]) -> None:
        """Also one that nobody waits for any more: kept, it would answer every later call."""
        failed = done.cancelled() or done.exception() is not None
        known = self._done.get(key)
        if failed and known is not None and known[1] is done:
            del self._done[key]
