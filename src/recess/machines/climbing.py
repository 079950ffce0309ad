"""Bringing a machine back by the best rung that works: `ladder.plan` decides, `BringBack` and `ColdBoot` act.

What failed on the way down is part of the report, so that nobody gets a cold machine without being told why. It must
never know why somebody wants the machine back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from recess.catalog.machines import MachineRecord
from recess.errors import BadInput, IllegalState, RecessError, Unavailable
from recess.machines import keptdisk
from recess.machines.bringback import BringBack
from recess.machines.coldboot import ColdBoot
from recess.machines.fleet import Fleet
from recess.machines.ladder import RUNGS, Remains, Step, Way, falls, plan
from recess.machines.parts import Parts
from recess.machines.service import ResumeReport
from recess.machines.snapshots import StoredSnapshots
from recess.machines.states import PAUSED, next_state

Unpause = Callable[[MachineRecord, int], Awaitable[ResumeReport]]

DISK_HINT = "`recess resume --disk` boots it cold from its disk: files are kept, memory is not"


class Climber:
    """The ladder of machines that do not run. `unpause` is rung 1. Every call expects the machine's lock to be held."""

    def __init__(
        self, parts: Parts, fleet: Fleet, unpause: Unpause, back: BringBack, cold: ColdBoot, stored: StoredSnapshots
    ) -> None:
        self._parts = parts
        self._fleet = fleet
        self._unpause = unpause
        self._back = back
        self._cold = cold
        self._stored = stored

    async def climb(
        self, record: MachineRecord, *, snapshots: Sequence[str], rungs: Collection[int], own_disk: bool, epoch: int
    ) -> ResumeReport:
        """Try the steps in order; see `recess.machines.service.Machines.bring_back`."""
        allowed = frozenset(rungs)
        if not allowed <= set(RUNGS):
            raise BadInput(f"rungs: out of {RUNGS}, got {sorted(allowed)}")
        next_state(record.state, "bring back", f"machine {record.name}")
        if record.state != PAUSED:
            await self._fleet.end(record.id, "it is brought back", keep_disk=True)  # what lingers after an exit
        steps = plan(self._remains(record, snapshots, own_disk), allowed)
        if not steps:
            raise IllegalState(
                f"machine {record.name} cannot be brought back by rung {_list(allowed)}: nothing is left for that",
                hint=f"it is {record.state}" + (f": {record.status}" if record.status else ""),
                state=record.state, move="bring back",
            )  # fmt: skip
        reasons: list[str] = []
        failures: list[RecessError] = []
        for step in steps:
            try:
                return await self._step(record, step, "; ".join(reasons), epoch)
            except RecessError as exc:
                if not falls(exc):
                    _point_down(exc, step, steps, reasons)
                    raise
                failures.append(exc)
                reasons.append(_failed(step, exc))
        failures[0].details["reasons"] = reasons
        raise failures[0]

    def _remains(self, record: MachineRecord, snapshots: Sequence[str], own_disk: bool) -> Remains:
        wanted = tuple(dict.fromkeys(snapshots)) or ((record.snapshot,) if record.snapshot else ())
        return Remains(record.state, wanted, own_disk and keptdisk.is_kept(self._parts.directory(record.id)))

    async def _step(self, record: MachineRecord, step: Step, before: str, epoch: int) -> ResumeReport:
        why = "; ".join(word for word in (record.status, before) if word)
        if step.way is Way.UNPAUSE:
            return await self._unpause(record, epoch)
        if step.way is Way.OWN_DISK:
            return (await self._cold.own(record, epoch=epoch, why=why))[1]
        row = await self._stored.get(step.snapshot)
        if step.way is Way.SNAPSHOT_DISK:
            return (await self._cold.snapshot(record, row, epoch=epoch, why=why))[1]
        return (await self._back.restore_as(record, row, epoch, before=before))[1]


def _list(rungs: Collection[int]) -> str:
    return ", ".join(map(str, sorted(rungs)))


def _failed(step: Step, error: RecessError) -> str:
    of = f" {step.snapshot[:16]}" if step.snapshot else ""
    return f"{step.way.value}{of} cannot be used: {error.message}"


def _point_down(error: RecessError, step: Step, steps: Sequence[Step], reasons: Sequence[str]) -> None:
    """Say in a passing fault's hint that there is a colder way, and what had failed before it."""
    if step.way is Way.MEMORY and isinstance(error, Unavailable) and len(steps) > 1 and steps[-1].way is not Way.MEMORY:
        error.hint = error.hint or DISK_HINT
    if reasons:
        error.details.setdefault("reasons", list(reasons))
