"""What happens to machines, for whoever watches: the newest events in memory, with numbers that only grow.

An event is told after the row says so; it is news, never the truth. Numbers begin at the server's start in microseconds,
so that a watcher who comes back after a restart with an old number misses and doubles nothing of the new server's. This
module must know nothing of states, rows or who listens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EVENTS_MAX = 2000


@dataclass(frozen=True)
class Event:
    """One event. `ts` in wall seconds; `action` is what was done or befell: create, start, die, pause, destroy, ..."""

    number: int
    ts: float
    action: str
    id: str
    name: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Events:
    """The newest events, and a way to wait for more. For one event loop."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._waiting: set[asyncio.Future[None]] = set()
        self._last = 0

    @property
    def newest(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self._last

    def publish(self, ts: float, action: str, ident: str, name: str, details: Mapping[str, Any]) -> None:
        """Add an event and wake who waits. Without a name it has that of the machine's event before."""
        name = name or next((event.name for event in reversed(self._kept) if event.id == ident and event.name), "")
        self._last = self._last + 1 if self._last else max(1, int(ts * 1_000_000))
        self._kept.append(Event(self._last, ts, action, ident, name, dict(details)))
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    def after(self, number: int) -> Sequence[Event]:
        """Return the kept events with a greater number, oldest first."""
        return [event for event in self._kept if event.number > number]

    async def wait(self, number: int) -> Sequence[Event]:
        """Return the events after `number`, waiting until there is one."""
        while not (found := self.after(number)):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await future
            finally:
                self._waiting.discard(future)
        return found
