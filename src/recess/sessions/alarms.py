"""Wake frozen sessions when their time has come. The times are in the sessions' rows; this only remembers them in memory.

A server that starts sets them again from the rows, so nothing here needs to be durable. Wall time is compared at least once
a minute: a corrected clock is noticed. It must know nothing of what a session does when it wakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from recess.clock import Clock
from recess.sessions.lease import wait_event

LOOK_S = 60.0


class Alarms:
    """`ring(session)` is called once for each alarm, when its wall time has come."""

    def __init__(self, clock: Clock, ring: Callable[[str], object]) -> None:
        self._clock = clock
        self._ring = ring
        self._due: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def set(self, session: str, due: float | None) -> None:
        """Set a session's one alarm (wall seconds), or take it back with None."""
        if due is None:
            self._due.pop(session, None)
            return
        self._due[session] = due
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="session-alarms")

    @property
    def any(self) -> bool:
        """Whether some alarm is set."""
        return bool(self._due)

    def has(self, session: str) -> bool:
        """Tell whether the session's alarm is set."""
        return session in self._due

    async def close(self) -> None:
        """Ring no more. May be called twice."""
        task, self._task = self._task, None
        self._due.clear()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            now = self._clock.wall_s()
            for session in [one for one, due in self._due.items() if due <= now]:
                del self._due[session]
                self._ring(session)
            left = min((due - now for due in self._due.values()), default=None)
            await wait_event(self._changed, None if left is None else min(left, LOOK_S), self._clock)
