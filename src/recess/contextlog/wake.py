"""Waking those who wait for a session's log to change, within this process, without polling. It must know no storage.

Lost wake-ups are impossible: a waiter registers first and looks at the log second, and a change is announced after it is
visible. A *ticket* is a number that changes with every change; taken before a reading and given to `wait`, it covers
changes between the two that do not move the head (deltas, states).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from recess.clock import Clock

_TICKETS_MAX = 65_536


class WakeHub:
    """Tickets and waiters by session. `notify` may be called from any event loop's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._count = 0
        self._floor = 0  # the largest ticket forgotten: an unknown session has at most this one
        self._tickets: OrderedDict[str, int] = OrderedDict()
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()  # `_tickets` and `_waiting` are of all loops' threads; held for a few lines only

    def ticket(self, session: str) -> int:
        """Return the session's present ticket."""
        with self._lock:
            return self._tickets.get(session, self._floor)

    def notify(self, session: str) -> None:
        """Announce a change that is visible by now."""
        with self._lock:
            self._count += 1
            self._tickets[session] = self._count
            self._tickets.move_to_end(session)
            while len(self._tickets) > _TICKETS_MAX:
                _, self._floor = self._tickets.popitem(last=False)
            waiting = tuple(self._waiting.get(session, ()))
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(event.set)

    def notify_all(self) -> None:
        """Announce that anything may have changed."""
        with self._lock:
            sessions = tuple(self._waiting)
        for session in sessions:
            self.notify(session)

    async def wait(
        self, session: str, ready: Callable[[], Awaitable[bool]], timeout_s: float, ticket: int | None
    ) -> bool:
        """Return True once `ready()` holds, or at any change since `ticket` (or since now); False on timeout."""
        seen = self.ticket(session) if ticket is None else ticket
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        with self._lock:
            self._waiting.setdefault(session, set()).add(waiter)
        try:
            if await ready() or self.ticket(session) != seen:
                return True
            return timeout_s > 0 and await self._within(event, timeout_s)
        finally:
            with self._lock:
                self._waiting[session].discard(waiter)
                if not self._waiting[session]:
                    del self._waiting[session]

    async def _within(self, event: asyncio.Event, timeout_s: float) -> bool:
        woken = asyncio.ensure_future(event.wait())
        late = asyncio.ensure_future(self._clock.sleep(timeout_s))
        try:
            await asyncio.wait({woken, late}, return_when=asyncio.FIRST_COMPLETED)
            return woken.done()
        finally:
            for task in (woken, late):
                task.cancel()
            await asyncio.gather(woken, late, return_exceptions=True)
