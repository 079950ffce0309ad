"""Machines that stand still because the host's disk is full: noticed, shown, and let go on when there is room again.

A write of the guest that the host's disk has no room for stops its vCPUs with the write pending: the guest sees no
error, nothing is lost, the same write is done again. That takes the room, and somebody who tries. Room is asked for now
and then, since no host tells of it; a try that comes too early only ends in the next stall.

"stalled" is shown in place of "running" and never stored: after a restart the VM itself says so again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable

from recess.errors import OutOfSpace, RecessError, Timeout
from recess.machines.live import Live
from recess.machines.parts import Parts
from recess.units import format_bytes, format_duration

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
SETTLED_S = 0.5
"""How long a machine that was let go on must run before it counts as running: one that stalls at once never did."""


def room_wanted(reserve_bytes: int, disk_bytes: int) -> int:
    """Return how much must be free before stalled machines are let go on: the node's reserve, on a small disk less."""
    return min(reserve_bytes, disk_bytes // 20)


class Stalls:
    """Watches one VM each in `watch`. `usage` returns (total, free) bytes of the disk that machines' disks are on."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.usage: Callable[[], tuple[int, int]] = self._usage

    def _usage(self) -> tuple[int, int]:
        found = shutil.disk_usage(self._parts.machines_dir)
        return found.total, found.free

    async def watch(self, live: Live) -> None:
        """Note every stall of a VM and end it when there is room. Returns when the VM is gone."""
        while True:
            try:
                await self._stand(live, live.stalled or await live.vm.wait_stalled())
            except (Timeout, OutOfSpace):
                await self._parts.clock.sleep(LOOK_EVERY_S)  # a host that is that busy is asked again; it is still so
            except RecessError:
                return  # the monitor went with the VM: its watcher tells the rest

    async def _stand(self, live: Live, reason: str) -> None:
        began = self._parts.clock.monotonic_s()
        live.stalled = reason  # first of all: who asks for its link is told at once
        self._say(f"machine {live.id} stands still: {reason}; it goes on by itself once there is room")
        while not await self._tried(live):
            await self._parts.clock.sleep(LOOK_EVERY_S)
        still = self._parts.clock.monotonic_s() - began
        live.drift_s += still
        if live.revive is not None:
            await live.revive()
            live.revive = None
        elif live.thaw is not None and live.paused_since == 0.0:
            with contextlib.suppress(RecessError):  # then the next wake-up sets its clock: the drift is noted
                await live.link.thaw(live.thaw())
                live.drift_s = 0.0
        live.stalled = ""
        self._say(f"machine {live.id} goes on after {format_duration(still)}")

    async def _tried(self, live: Live) -> bool:
        """Let a VM go on if there is room; True when it did and did not stall again at once."""
        total, free = self.usage()
        if free < room_wanted(self._parts.keeping.reserve_bytes, total):
            return False
        await live.vm.go_on()
        await self._parts.clock.sleep(SETTLED_S)
        return not await live.vm.stalled()

    def _say(self, line: str) -> None:
        log.warning(line)
        self._parts.progress(line)


def check_goes(live: Live, name: str) -> None:
    """Raise OutOfSpace for a machine that stands still, at once: nothing inside would answer."""
    if live.stalled:
        raise OutOfSpace(
            f"machine {name} stands still: {live.stalled}",
            hint="make room on the host's disk; it goes on by itself, nothing is lost",
        )


def hint_of(parts: Parts) -> str:
    """Return what a list says beside a stalled machine."""
    free = shutil.disk_usage(parts.machines_dir).free
    return f"{format_bytes(free)} are free in {parts.machines_dir}: make room there, it goes on by itself"
