"""A clock that only moves when told: `advance` wakes the sleepers whose time has come, in order of their deadlines."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class FakeClock:
    """`recess.clock.Clock` under a test's control. `wall_s` may be set; `monotonic_s` only goes forward."""

    def __init__(self, wall_s: float = 1_700_000_000.0) -> None:
        self._wall_offset = wall_s
        self._now = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def wall_s(self) -> float:
        """Return the wall time as set and advanced."""
        return self._wall_offset + self._now

    def monotonic_s(self) -> float:
        """Return seconds advanced so far."""
        return self._now

    @property
    def sleepers(self) -> int:
        """How many tasks are asleep on this clock."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def sleep(self, seconds: float) -> None:
        """Return once the clock was advanced by this much."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Move both clocks forward, waking sleepers at their own time; each woken task runs until it waits again."""
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back; use `jump_wall`")
        await settle()
        end = self._now + seconds
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            if future.done():
                continue
            self._now = max(self._now, due)
            future.set_result(None)
            await settle()
        self._now = end

    def jump_wall(self, seconds: float) -> None:
        """Move the wall clock alone, forward or back, as a host's clock correction does."""
        self._wall_offset += seconds


async def settle(rounds: int = 20) -> None:
    """Let the tasks that can run do so (bounded: tasks that wait for threads or sockets are not waited for)."""
    for _ in range(rounds):
        await asyncio.sleep(0)
