"""The lease of one session as its holder sees it, and the gate that the broker asks.

Both fail closed by the monotonic clock: at the lease's end minus a margin nothing may act any more, whether or not the
database can be reached. This module must know nothing of what the machine does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from recess.clock import Clock


@dataclass
class Lease:
    """A lease that is held: renewed by moving `ends` (monotonic seconds). Measured from before the claim was sent, so
    that our end always comes before the database's."""

    session: str
    epoch: int
    ends: float
    margin_s: float
    lost: bool = False

    def left_s(self, now: float) -> float:
        """Return how long we may act yet."""
        return 0.0 if self.lost else max(0.0, self.ends - self.margin_s - now)


@dataclass
class _Held:
    lease: Lease
    epochs: frozenset[int]
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseGate:
    """`may_act` and `wait_lost` for the machines of sessions (the broker's Gate). Unknown machines may not act."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held: dict[str, _Held] = {}

    def admit(self, machine_id: str, lease: Lease, epochs: Iterable[int]) -> None:
        """Let this machine act while the lease lasts. `epochs`: those under which this very VM has been ours without a
        break (a restarted server claims a new epoch, and the VM it re-attached to was started under an older one)."""
        self.dismiss(machine_id)
        self._held[machine_id] = _Held(lease, frozenset(epochs))

    def dismiss(self, machine_id: str) -> None:
        """It may not act any more; open streams are cut by those who wait in `wait_lost`."""
        held = self._held.pop(machine_id, None)
        if held is not None:
            held.gone.set()

    def may_act(self, machine_id: str, epoch: int) -> bool:
        """Tell whether an outside call may start now. Asks no database."""
        held = self._held.get(machine_id)
        return held is not None and epoch in held.epochs and held.lease.left_s(self._clock.monotonic_s()) > 0

    async def wait_lost(self, machine_id: str, epoch: int) -> None:
        """Return once `may_act` has become False for this pair (at once if it is)."""
        while self.may_act(machine_id, epoch):
            held = self._held[machine_id]
            left = held.lease.left_s(self._clock.monotonic_s())
            await wait_event(held.gone, left, self._clock)


async def wait_event(event: asyncio.Event, seconds: float | None, clock: Clock) -> bool:
    """Wait for an event, at most `seconds` by the injected clock; tell whether it came."""
    if event.is_set() or seconds is None:
        await event.wait()
        return True
    waiter = asyncio.create_task(event.wait())
    timer = asyncio.create_task(clock.sleep(seconds))
    try:
        await asyncio.wait({waiter, timer}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
        timer.cancel()
        await asyncio.gather(waiter, timer, return_exceptions=True)
    return event.is_set()
