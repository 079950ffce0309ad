"""Stopping a turn on demand: a flag, an event, and the race between some work and that event. It knows no wire, no log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")
CANCELLED = "not run: the turn was cancelled"
CUT_SHORT = "cancelled: it may have been done in part"


class TurnCancelled(Exception):
    """The turn was stopped, by a cancel or by a message that interrupts it. If your loop lets it out, the loop is begun anew
    for the next turn in the same process; catch it to keep the loop's local variables."""


class Stop:
    """Whether the turn at work is to stop, and why."""

    def __init__(self) -> None:
        self.why = ""
        self._event = asyncio.Event()

    @property
    def asked(self) -> bool:
        """Whether the turn is to stop."""
        return self._event.is_set()

    def ask(self, why: str) -> None:
        """Stop it."""
        self.why = why or "cancelled"
        self._event.set()

    def check(self) -> None:
        """Raise TurnCancelled if the turn is to stop."""
        if self.asked:
            raise TurnCancelled(self.why)

    async def race(self, work: Awaitable[T]) -> T:
        """Return what `work` returns, or cancel it and raise TurnCancelled when the turn is to stop."""
        task: asyncio.Future[T] = asyncio.ensure_future(work)
        stop: asyncio.Future[Any] = asyncio.ensure_future(self._event.wait())
        both: set[asyncio.Future[Any]] = {task, stop}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise TurnCancelled(self.why)
        finally:
            for one in (task, stop):
                one.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)
