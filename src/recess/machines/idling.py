"""Idle policy of plain machines: one that nobody uses for a while is suspended with its memory, and wakes when it is used.

In use means: a process that somebody is attached to, a file operation, an open connection to a published port, an open call
of its own through the broker, or work: more than a fifth of a CPU since the last look. Looking at it (ps, logs, inspect,
stats) is no use, and wakes nobody.

Its published ports stay open while it sleeps: whoever connects wakes it and is then served. No use is lost in between: a
user counts as one before the machine is looked for, and the decision to put it away is taken under its lock, without a
pause between the last look at its users and the word that it is going; who comes after that word waits and wakes it.

It must never know of sessions, which have an idle policy of their own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from recess.catalog.machines import MachineRecord
from recess.errors import RecessError
from recess.guestlink.link import GuestLink
from recess.machines.fleet import Fleet
from recess.machines.forward import Forwarder
from recess.machines.live import Live
from recess.machines.parts import Parts
from recess.machines.states import RUNNING, SUSPENDED

NAPPING = "napping"
"""In a row's meta: it was put away because nobody used it, and wakes by itself."""

WORKING_SHARE = 0.2  # of one CPU, between two looks
LOOKS = 4  # in one idle time
LOOK_MIN_S = 0.25
LOOK_MAX_S = 15.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """What is going on with a machine at one look. `users`: attached clients and file operations; `connections`: to its
    ports; `calls`: its own, outwards; `cpu_share` of one CPU since the last look."""

    users: int = 0
    connections: int = 0
    calls: int = 0
    cpu_share: float = 0.0

    @property
    def any(self) -> bool:
        """Whether it is in use."""
        return bool(self.users or self.connections or self.calls or self.cpu_share > WORKING_SHARE)


def due(use: Use, quiet_s: float, idle_s: float) -> float:
    """Return in how many seconds to look again at a machine that was quiet this long; 0: put it away. Pure."""
    look = min(LOOK_MAX_S, max(LOOK_MIN_S, idle_s / LOOKS))
    if use.any:
        return look
    return max(0.0, min(look, idle_s - quiet_s))


def is_napping(record: MachineRecord) -> bool:
    """Tell whether a machine sleeps and wakes by itself."""
    return record.state == SUSPENDED and bool(record.meta.get(NAPPING))


Wake = Callable[[MachineRecord], Awaitable[object]]
PutAway = Callable[[MachineRecord], Awaitable[object]]


class Idling:
    """The idle policy of a node's machines. `wake` and `put_away` expect the machine's lock to be held."""

    def __init__(self, parts: Parts, fleet: Fleet, *, wake: Wake, put_away: PutAway) -> None:
        self._parts = parts
        self._fleet = fleet
        self._wake = wake
        self._put_away = put_away
        self._users: Counter[str] = Counter()
        self._last: dict[str, float] = {}  # monotonic: when it was in use last
        self._going: set[str] = set()
        fleet.admitted = self.watch
        fleet.reach = self.reach

    # --- use --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, machine_id: str, *, wake: bool = True) -> AsyncIterator[GuestLink]:
        """Use a machine: it is not put away meanwhile. `wake`: one that sleeps is woken, else IllegalState says that it
        does. Raises NotFound, IllegalState, and what waking raises."""
        self._users[machine_id] += 1
        try:
            yield await self.reach(machine_id, wake=wake)
        finally:
            self._users[machine_id] -= 1
            if not self._users[machine_id]:
                del self._users[machine_id]
            if machine_id in self._last:
                self._last[machine_id] = self._parts.clock.monotonic_s()

    async def reach(self, machine_id: str, *, wake: bool = True) -> GuestLink:
        """Return the link of a machine, woken if it sleeps because nobody used it."""
        live = self._fleet.find(machine_id)
        if live is not None and machine_id not in self._going:
            return self._fleet.link_to(live)
        async with self._fleet.lock(machine_id):
            record = await self._parts.catalog.machines.get(machine_id)
            if wake and is_napping(record):
                try:
                    await self._wake(record)
                except RecessError:
                    await self._open_door(record)  # it sleeps on, and whoever comes next tries again
                    raise
                self._parts.tell("wake", record.id, record.name)
        return self._fleet.link_to(await self._fleet.need_running(machine_id))

    # --- watching -----------------------------------------------------------------------------------------------

    def watch(self, live: Live) -> None:
        """Begin to look after a machine that has come to life."""
        if live.spec.idle_s > 0:
            self._last[live.id] = self._parts.clock.monotonic_s()
            live.idle_watcher = asyncio.create_task(self._watch(live), name=f"idle-{live.id}")

    async def _watch(self, live: Live) -> None:
        try:
            await self._until_idle(live)
        finally:
            self._last.pop(live.id, None)
        self._fleet.aside(self._nap(live))  # not in this task, which ends with the VM

    async def _until_idle(self, live: Live) -> None:
        cpu, at = await self._cpu(live), self._parts.clock.monotonic_s()
        while True:
            await self._parts.clock.sleep(LOOK_MIN_S)
            now = self._parts.clock.monotonic_s()
            used = await self._cpu(live)
            use = self._use(live, (used - cpu) / (now - at) if now > at else 0.0)
            cpu, at = used, now
            if use.any:
                self._last[live.id] = now
            wait_s = due(use, now - self._last.get(live.id, now), live.spec.idle_s)
            if not wait_s:
                return
            await self._parts.clock.sleep(max(0.0, wait_s - LOOK_MIN_S))

    def _use(self, live: Live, cpu_share: float) -> Use:
        still = bool(live.paused_since or live.stalled)  # somebody paused it, or nothing can be stored now
        calls = self._parts.egress.open_connections(live.id) if self._parts.egress is not None else 0
        connections = live.forwarder.connections if live.forwarder is not None else 0
        return Use(self._users[live.id] + still, connections, calls, cpu_share)

    @staticmethod
    async def _cpu(live: Live) -> float:
        with suppress(RecessError):
            return (await live.vm.stats()).cpu_s
        return 0.0

    async def _nap(self, live: Live) -> None:
        async with self._fleet.lock(live.id):
            record = await self._parts.catalog.machines.find(live.id)
            if record is None or record.state != RUNNING or self._fleet.find(live.id) is not live:
                return
            if self._use(live, 0.0).any:
                self.watch(live)
                return
            self._going.add(live.id)  # no await between that look and this
            door, live.forwarder = live.forwarder, None  # it is not closed with the VM
            try:
                record = await self._note(record, napping=True)
                await self._put_away(record)
            except RecessError as exc:
                log.warning("machine %s is idle and could not be put away: %s", record.id, exc.message)
                with suppress(RecessError):
                    await self._note(record, napping=False)
                if self._fleet.find(live.id) is live:
                    live.forwarder, door = door, None
                    self.watch(live)
            else:
                self._fleet.doors[live.id] = door or Forwarder(self._fleet.link_of(live.id))
                door = None
                self._parts.tell("idle", record.id, record.name, idle_s=live.spec.idle_s)
            finally:
                self._going.discard(live.id)
                if door is not None:
                    await door.stop()

    async def _note(self, record: MachineRecord, *, napping: bool) -> MachineRecord:
        """Say in the row that it sleeps by itself. A crash before it is put away leaves it running, and the word without a
        meaning until somebody suspends it, which takes it back."""

        def decide(row: MachineRecord) -> dict[str, object]:
            return {
                "meta": {**{k: v for k, v in row.meta.items() if k != NAPPING}, **({NAPPING: True} if napping else {})}
            }

        return await self._parts.catalog.machines.change(record.id, decide)

    async def stay(self, record: MachineRecord) -> MachineRecord:
        """Somebody puts the machine away by hand: then only somebody's hand brings it back."""
        return await self._note(record, napping=False) if record.meta.get(NAPPING) else record

    # --- the server comes and goes ------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Open the ports of machines that sleep; a port that is taken meanwhile moves."""
        readable, _ = await self._parts.catalog.machines.survey_in_states(
            [SUSPENDED]
        )  # a damaged row costs only itself
        for record in readable:
            if is_napping(record):
                await self._open_door(record)

    async def _open_door(self, record: MachineRecord) -> None:
        ports = record.meta.get("ports")
        if not ports or record.id in self._fleet.doors:
            return
        door = Forwarder(self._fleet.link_of(record.id))
        with suppress(RecessError):
            found = await door.start([(str(ip), int(host), guest) for ip, host, guest in ports], fall_back=True)
            self._fleet.doors[record.id] = door
            meta = {**record.meta, "ports": [list(port) for port in found]}
            await self._parts.catalog.machines.update(record.id, meta=meta)

    async def close(self) -> None:
        """Close the ports of machines that sleep."""
        for machine_id in list(self._fleet.doors):
            await self._fleet.close_doors(machine_id)
