"""The warm pool: VMs that wait, so that a restore need not start a process.

Every restore says what it would take (`Order`); how many of each kind wait is decided from that demand
(`pool_sizes.wanted`). VMs are started one at a time and only while no restore is under way: whoever starts a machine
comes first. A VM that dies while it waits, or whose files were replaced, is ended and never taken.

It must know nothing of how a VM is started or taken (`pool_member`), nor of machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from recess.drivers.kept.steps import to_the_end
from recess.drivers.qemu.pool_member import Kind, Member, Order
from recess.drivers.qemu.pool_sizes import KEEP_S, STARTS_MAX, Facts, wanted
from recess.errors import RecessError
from recess.machines.contract import KeptReady
from recess.units import MIB

QUIET_S = 0.05
"""After a restore its guest and its thaw come first; a pool that is filled later loses nothing."""

TICK_S = 5.0
"""How often it looks whether fewer should wait, or files have changed."""

BACK_OFF_S = 30.0
"""A kind that could not be started, or died while it waited, is not tried again for that long."""

EACH_BYTES = 40 * MIB
"""Taken for what a VM that waits costs until one was measured."""

log = logging.getLogger(__name__)


def free_memory() -> int:
    """Return the bytes of memory that the host could give (`MemAvailable` of /proc/meminfo), 0 if it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


class WarmPool:
    """At most `limit` VMs that wait. To be used in one event loop; `close` ends them."""

    def __init__(
        self, limit: int, make: Callable[[Order], Awaitable[Member]], *, now: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] = free_memory, quiet_s: float = QUIET_S,
    ) -> None:  # fmt: skip
        self._limit = limit
        self._make = make
        self._now = now
        self._free_bytes = free_bytes
        self._quiet_s = quiet_s
        self._starts: dict[Kind, deque[float]] = {}
        self._orders: dict[Kind, Order] = {}
        self._waiting: list[Member] = []
        self._barred: dict[Kind, float] = {}
        self._each_bytes = EACH_BYTES
        self._under_way = 0
        self._taken = self._missed = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._keeping: asyncio.Task[None] | None = None
        self._closed = False

    def _off(self) -> bool:
        return self._closed or self._limit <= 0

    @contextlib.contextmanager
    def under_way(self, order: Order | None) -> Iterator[None]:
        """Note a restore that would take this, and hold the pool off while the block runs."""
        if self._off():
            yield
            return
        self._under_way += 1
        self._calm.clear()
        if order is not None:
            self._orders[order.kind] = order
            self._starts.setdefault(order.kind, deque(maxlen=STARTS_MAX)).append(self._now())
        try:
            yield
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self._calm.set()
            self._look()

    def take(self, order: Order | None) -> Member | None:
        """Return a VM of this kind, the caller's from now on, or None if none waits."""
        if self._off() or order is None:
            return None
        for member in self._waiting:
            if member.order.kind == order.kind and member.alive():
                self._waiting.remove(member)
                member.not_on_death(self._look)
                self._taken += 1
                return member
        self._missed += 1
        return None

    def about(self) -> KeptReady:
        """Return what waits, and how often that was of use."""
        held = sum(member.bytes for member in self._waiting)
        return KeptReady(len(self._waiting), held, max(0, self._limit), self._taken, self._missed)

    async def resize(self, limit: int) -> None:
        """Let at most this many wait from now on; returns when no more do. With 0 what was asked for is forgotten, too."""
        self._limit = limit
        if limit <= 0:
            for known in (self._starts, self._orders, self._barred):
                known.clear()
        self._look()
        await self.settled()

    async def settled(self) -> None:
        """Return when as many wait as should, as far as that could be had."""
        await self._settled.wait()

    async def close(self) -> None:
        """End those that wait, and start no more. May be called twice."""
        self._closed = True
        task, self._keeping = self._keeping, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        waiting, self._waiting = self._waiting, []
        await to_the_end(_end(waiting))
        self._settled.set()

    # --- keeping it as large as it should be --------------------------------------------------------------------

    def _look(self, _what: object = None) -> None:
        if self._closed:
            return
        self._settled.clear()
        self._changed.set()
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.get_running_loop().create_task(self._keep(), name="warm-pool")

    async def _keep(self) -> None:
        """Bring the pool to its size, again and again, until nobody has asked for long."""
        while self._orders or self._waiting:
            self._changed.clear()
            sizes = self._sizes()
            await self._end_surplus(sizes)
            order = self._missing(sizes)
            if order is None:
                if not self._changed.is_set():
                    self._settled.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._changed.wait()
                continue
            await self._calm.wait()
            await asyncio.sleep(self._quiet_s)
            if self._calm.is_set():
                await to_the_end(self._add(order))
        self._settled.set()

    def _sizes(self) -> dict[Kind, int]:
        now = self._now()
        for kind in [kind for kind, starts in self._starts.items() if now - starts[-1] >= KEEP_S]:
            del self._starts[kind], self._orders[kind]
            self._barred.pop(kind, None)
        held = sum(member.bytes for member in self._waiting)
        starts = {kind: list(times) for kind, times in self._starts.items() if self._barred.get(kind, now) <= now}
        sizes = wanted(Facts(now, starts, self._limit, self._free_bytes() + held, self._each_bytes))
        return {kind: count for kind, count in sizes.items() if self._orders[kind].is_current()}

    async def _end_surplus(self, sizes: dict[Kind, int]) -> None:
        left = dict(sizes)
        keep: list[Member] = []
        gone: list[Member] = []
        for member in self._waiting:
            kind = member.order.kind
            if not member.alive():
                self._bar(kind, "it died while it waited")
                gone.append(member)
            elif left.get(kind, 0) > 0:
                left[kind] -= 1
                keep.append(member)
            else:
                gone.append(member)
        self._waiting = keep  # those that go cannot be taken any more
        await to_the_end(_end(gone))

    def _missing(self, sizes: dict[Kind, int]) -> Order | None:
        now = self._now()
        for kind, count in sizes.items():
            there = sum(member.order.kind == kind for member in self._waiting)
            if there < count and self._barred.get(kind, now) <= now and kind in self._orders:
                return self._orders[kind]
        return None

    async def _add(self, order: Order) -> None:
        try:
            member = await self._make(order)
        except (RecessError, OSError) as exc:
            self._bar(order.kind, str(exc))
            return
        self._each_bytes = max(1, member.bytes or EACH_BYTES)
        self._waiting.append(member)
        member.on_death(self._look)

    def _bar(self, kind: Kind, why: str) -> None:
        self._barred[kind] = self._now() + BACK_OFF_S
        log.warning("no VM waits for the next restore of template %s: %s", kind.template[:16], why)


async def _end(members: Sequence[Member]) -> None:
    await asyncio.gather(*(member.end() for member in members))
