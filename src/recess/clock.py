"""Time as an injected effect: wall time for what people read, monotonic time for every deadline.

Decisions never call `time` themselves. `recess.testing.FakeClock` is the other implementation.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. `wall_s` may jump; `monotonic_s` never goes back and is what deadlines are measured in."""

    def wall_s(self) -> float:
        """Return seconds since the Unix epoch."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds of a clock that only goes forward (CLOCK_MONOTONIC on the real one)."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for this long by the monotonic clock."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def wall_s(self) -> float:
        """Return seconds since the Unix epoch."""
        return time.time()

    def monotonic_s(self) -> float:
        """Return CLOCK_MONOTONIC in seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop."""
        await asyncio.sleep(seconds)
