"""Machines that have a VM on this node right now: the objects behind a row, and the one place they are kept.

A `Live` is dropped exactly once, when its VM is gone; whoever waits for that waits on `gone`. It must know nothing of
rows or states.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from recess.guestlink.link import GuestLink, Thaw
from recess.machines.contract import Vm
from recess.machines.forward import Forwarder
from recess.machines.mainjob import MainJob
from recess.machines.service import MachineSpec
from recess.machines.templates import Template

DRIFT_MAX_S = 0.1
"""How far a guest's clock may fall behind through pauses before a wake-up sets it (a thaw) instead of only unfreezing."""


def needs_clock(drift_s: float, pause_s: float) -> bool:
    """Decide whether waking after this pause must also set the guest's clock."""
    return drift_s + pause_s > DRIFT_MAX_S


@dataclass
class Live:
    """One running or paused VM. `parent` is the snapshot its memory stems from. Times are monotonic seconds."""

    id: str
    vm: Vm
    spec: MachineSpec
    template: Template
    epoch: int
    used_s: float = field(kw_only=True)  # when it was started, or somebody last asked for its link
    parent: str = ""
    answered_s: float = 0.0  # when guestd first answered after this start
    workload_frozen: bool = False
    paused_since: float = 0.0  # 0.0: the vCPUs run
    drift_s: float = 0.0
    ending: str = ""  # why an end that we asked for comes; empty: nobody asked
    keep_disk: bool = True  # once it is gone: until somebody ends it who needs its files no more
    stalled: str = ""  # why its vCPUs stand still although nobody paused it; empty: they do not
    detached: bool = False
    reason: str = ""
    stopping: bool = False  # somebody asked for its end: a main process that ends is not started again
    restarts: int = 0  # of the main process, in a row
    main_since: float = 0.0  # when the main process was started, or found
    forwarder: Forwarder | None = None
    main: MainJob | None = None
    watcher: asyncio.Task[None] | None = None
    revive: Callable[[], Awaitable[None]] | None = None  # what is to be done when a stall ends that began before us
    stall_watcher: asyncio.Task[None] | None = None
    token_mark: str = ""  # what its token is known by (`identity.mark_of`)
    idle_watcher: asyncio.Task[None] | None = None
    thaw: Callable[[], Thaw] | None = None  # makes the message that sets its clock and identity again
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def link(self) -> GuestLink:
        """The guest link of the VM."""
        return self.vm.link

    async def wake(self, stood_still_s: float) -> None:
        """Let the workload run again after a pause in place. Raises GuestFailed, Timeout: then do not serve it."""
        if self.thaw is not None and needs_clock(self.drift_s, stood_still_s):
            await self.link.thaw(self.thaw())
            self.drift_s = 0.0
        else:
            await self.link.unfreeze()
            self.drift_s += stood_still_s
        self.workload_frozen = False

    async def let_go(self) -> None:
        """Close what belongs to this server (ports, log copy), not to the VM. May be called twice."""
        for watcher in (self.stall_watcher, self.idle_watcher):
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
        if self.main is not None:
            await self.main.stop()
        if self.forwarder is not None:
            await self.forwarder.stop()
