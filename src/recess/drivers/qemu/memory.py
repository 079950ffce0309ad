"""A VM's memory at a capture: how its changes are known, and the pages of one instant.

Two ways. *Tracked*: the keeper notes every write exactly, so a capture holds what changed since the snapshot that is
its parent, and most of it is copied while the VM still runs. *Private pages*: what the VM has written since it was
started, all copied in the pause; for kernels before 6.7, a VMM that may not be traced, or when it is switched off.
Which one a VM has is decided once, before it runs, and told with the reason.

This module knows the keeper's requests; it must know nothing of disks, device state or QEMU's monitor.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from recess.drivers.kept import disk
from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.keeper import Keeper, Process
from recess.drivers.kept.paged import serve_watched
from recess.drivers.qemu.journal import Journal
from recess.errors import DriverFailed, OutOfSpace, RecessError
from recess.machines.contract import LazyMemory, MappedMemory

NONE = "none"
_MODES = {
    "kernel": "every write is noted",
    "user": "every write is noted; without the right to catch the kernel's own faults, memory is never restored lazily",
}


@dataclass(frozen=True)
class Tracking:
    """How a VM's changes are known. `way`: kernel, user (a userfaultfd without rights) or none; `why`: one line.
    `base`: the snapshot that a delta counts from, "" before the first."""

    way: str
    why: str
    base: str = ""

    @property
    def exact(self) -> bool:
        """Whether the keeper notes writes."""
        return self.way != NONE


UNTRACKED = Tracking(NONE, "it was never asked for")


async def begin_tracking(keeper: Keeper, base: str, *, mode: str, known: int | None = None) -> Tracking:
    """Have a VM that has not run yet tracked, as far as this host can. `mode`: auto, user or private (page_tracking).

    A host that cannot is no error, a VM that is gone is (DriverFailed), and so is a full one (OutOfSpace).
    """
    if mode == "private":
        return Tracking(NONE, "switched off (page_tracking = private)")
    try:
        way = await keeper.track(base, user_only=mode == "user", known=known)
    except OutOfSpace:
        raise
    except DriverFailed as exc:
        if keeper.death.done() or keeper.gone.done():
            raise
        return Tracking(NONE, f"this host cannot: {exc.message}")
    return Tracking(way, _MODES.get(way, way), base)


async def begin_lazy(keeper: Keeper, vmm: Process, base: str, lazy: LazyMemory) -> Tracking:
    """Track a VM that has not run yet, and have its memory brought by a pager. Not `exact` if this host cannot: nothing
    has changed then. Raises DriverFailed, Timeout (the VM must be ended: some of its pages may be absent)."""
    ranges = await lazy.ranges()
    try:
        uffd, segments = await keeper.track_absent(base, ranges)
    except DriverFailed as exc:
        if keeper.death.done() or keeper.gone.done():
            raise
        return Tracking(NONE, f"this host cannot: {exc.message}")
    finally:
        os.close(ranges)
    try:
        with vmm.held() as process:
            await serve_watched(keeper, lazy, uffd, process, segments)
    except ProcessLookupError as exc:
        raise DriverFailed("the VM has ended before its memory came") from exc
    finally:
        os.close(uffd)
    return Tracking("kernel", _MODES["kernel"], base)


async def map_in_place(keeper: Keeper, mapped: MappedMemory) -> str:
    """Map a memory's files over that of a VM that has not run yet. Returns "", or why this host cannot: then every page
    must be put there, which is right whatever was mapped. Raises DriverFailed if the VM is gone."""
    try:
        await keeper.remap(mapped.files, mapped.runs)
    except DriverFailed as exc:
        if keeper.death.done() or keeper.gone.done():
            raise
        return f"this host cannot map it: {exc.message}"
    return ""


async def find_tracking(keeper: Keeper) -> Tracking:
    """Return how the VM of an earlier server is tracked: its keeper knows."""
    way, base, _ = await keeper.tracking()
    return Tracking(way, _MODES.get(way, "an earlier server started it so"), base)


@dataclass(frozen=True)
class Plan:
    """What a capture asks the keeper for. `tracked`: delta or all; else `kind`: private, file or file-all.
    `parent`: the snapshot that pages left out are equal to, "" for the RAM file."""

    tracked: bool
    kind: str
    parent: str = ""


def plan_capture(tracking: Tracking, journal: Journal, parent: str) -> Plan:
    """Decide which pages to copy for a capture whose caller can build on the snapshot `parent` ("" on none)."""
    if tracking.exact:
        delta = bool(parent) and parent == tracking.base
        return Plan(True, "delta" if delta else "all", parent if delta else "")
    if not journal.shared:
        return Plan(False, "private")
    # Shared RAM over a template must give zero pages too: the template's page there may be another.
    return Plan(False, "file" if journal.base == "boot" else "file-all")


class MemoryCapture:
    """One capture's memory: `prepare` while the VM runs, `take` in the pause, `collect` after it."""

    def __init__(self, keeper: Keeper, plan: Plan) -> None:
        self.plan = plan
        self.generation = 0
        self._keeper = keeper
        self._taken: tuple[int, int] | None = None

    async def prepare(self) -> None:
        """Copy what can be copied early and touch what the pause will need."""
        if self.plan.tracked:
            if self.plan.kind == "all":
                await keepers.all_brought(self._keeper)
            await self._keeper.prepare(self.plan.kind)
        elif self.plan.kind == "private":
            await self._keeper.prepare()

    async def take(self) -> None:
        """Copy the rest; the VM is stopped."""
        if self.plan.tracked:
            _, self.generation = await self._keeper.capture_tracked(self.plan.kind)
        else:
            self._taken = await self._keeper.capture(self.plan.kind)

    async def collect(self) -> disk.Packed:
        """Return the pages, the caller's from now on."""
        taken, self._taken = self._taken, None
        return disk.map_packed(*(taken or await self._keeper.collect()))

    async def drop(self) -> None:
        """Give up whatever was copied. Never fails; may be called after `collect`, and twice."""
        taken, self._taken = self._taken, None
        if taken is not None:
            os.close(taken[0])
        with contextlib.suppress(RecessError):
            await self._keeper.release()
