"""Idempotency keys of creating calls: the same key again gets the first answer, never a second object.

Kept in memory, the newest 4,096 keys of this server's life: a create that was answered before a restart is found by
its name (NameInUse). Messages do not use this: the log keeps their keys for the life of the session.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from recess.errors import KeyReused

KEYS_MAX = 4096


class KeyedResults:
    """Runs work once per key; concurrent and later calls with the same key and body share its result."""

    def __init__(self) -> None:
        self._done: OrderedDict[str, tuple[str, asyncio.Future[dict[str, Any]]]] = OrderedDict()

    async def run(self, key: str, body: object, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Return the work's result; a failure is not kept, so that it may be tried again. Raises KeyReused."""
        if not key:
            return await work()
        digest = hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()
        known = self._done.get(key)
        if known is not None:
            if known[0] != digest:
                raise KeyReused(f"idempotency key {key!r} came with another body before")
            return await asyncio.shield(known[1])
        future = asyncio.ensure_future(work())
        self._done[key] = (digest, future)
        while len(self._done) > KEYS_MAX:
            self._done.popitem(last=False)
        try:
            return await asyncio.shield(future)
        except BaseException:
            if future.done():
                self._done.pop(key, None)
            raise
