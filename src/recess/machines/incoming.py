"""Which handler serves the streams that a guest opens: a table by machine and service that outlives every link.

A stream for a service nobody has registered yet waits a bounded time: after a restart of the server the guest's
clients reconnect at once, often before the sessions room is there again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from recess.guestlink.link import ByteStream, IncomingHandler

WAIT_S = 10.0
WAITING_MAX = 64  # streams that wait, all machines together


class Incoming:
    """The table of handlers."""

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self._handlers: dict[tuple[str, str], IncomingHandler] = {}
        self._arrived: dict[tuple[str, str], asyncio.Event] = {}
        self._wait_s = wait_s
        self._waiting = 0

    def set(self, machine_id: str, service: str, handler: IncomingHandler | None) -> None:
        """Register, replace or (None) remove the handler of a service."""
        key = (machine_id, service)
        if handler is None:
            self._handlers.pop(key, None)
            return
        self._handlers[key] = handler
        self._arrived.pop(key, asyncio.Event()).set()

    def forget(self, machine_id: str) -> None:
        """Drop everything about a machine."""
        for key in [k for k in self._handlers if k[0] == machine_id]:
            del self._handlers[key]

    def router(self, machine_id: str) -> IncomingHandler:
        """Return the one handler to give to a machine's link."""

        async def route(service: str, metadata: Mapping[str, Any], stream: ByteStream) -> None:
            handler = await self._find((machine_id, service))
            if handler is None:
                await stream.close()
            else:
                await handler(service, metadata, stream)

        return route

    async def _find(self, key: tuple[str, str]) -> IncomingHandler | None:
        if key not in self._handlers and self._waiting < WAITING_MAX:
            self._waiting += 1
            event = self._arrived.setdefault(key, asyncio.Event())
            try:
                async with asyncio.timeout(self._wait_s):
                    await event.wait()
            except TimeoutError:
                self._arrived.pop(key, None)
            finally:
                self._waiting -= 1
        return self._handlers.get(key)
