"""Starting main processes again, as the machine's restart policy (`restartpolicy`) says.

A process is started again in the same VM, whose memory and files stay. It must know nothing of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from recess.errors import NotFound
from recess.machines.live import Live
from recess.machines.mainjob import JOB_ID
from recess.machines.parts import Parts
from recess.machines.restartpolicy import decide
from recess.machines.starting import Starter


class Restarts:
    """Starts main processes again."""

    def __init__(self, parts: Parts, starter: Starter, is_current: Callable[[Live], bool]) -> None:
        self._parts = parts
        self._starter = starter
        self._is_current = is_current

    def due(self, live: Live, code: int) -> float | None:
        """Return after how many seconds the process is started again, None for never; counts it."""
        if live.ending or live.stopping:
            return None
        lived = self._parts.clock.monotonic_s() - live.main_since
        verdict = decide(live.spec.restart, code, live.restarts, lived)
        if verdict is None:
            return None
        live.restarts = verdict[0]
        return verdict[1]

    async def wait(self, live: Live, delay_s: float) -> bool:
        """Wait for its turn; False when the machine has ended, or is being stopped, meanwhile. A machine that stands
        still is waited for: nothing can be started in it."""
        await self._parts.clock.sleep(delay_s)
        while self._is_current(live) and (live.paused_since or live.stalled) and not live.stopping:
            await self._parts.clock.sleep(1.0)
        return self._is_current(live) and not live.ending and not live.stopping

    async def start(self, live: Live) -> None:
        """Start the process anew; the caller holds the machine's lock. Raises NotFound, GuestFailed, IllegalState."""
        with suppress(NotFound):  # the guest's table may have let it go
            await live.link.forget(JOB_ID)
        await self._starter.start_main(live)
