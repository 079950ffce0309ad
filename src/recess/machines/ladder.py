"""Which way a machine that does not run comes back: the ladder's rungs 1 to 4 as a pure decision over what is left of it.

(1) warm: parked in memory; (2) local snapshot; (3) remote snapshot; (4) disk only, cold boot. Rung 5, a fresh machine,
is not this room's to choose: it means that nothing of the machine is left. No clock, no store, no driver in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from recess.errors import Corrupt, Incompatible, NotFound, RecessError, Unsupported
from recess.machines.states import PAUSED

RUNGS = (1, 2, 3, 4)
MEMORY_RUNGS = frozenset({2, 3})


class Way(StrEnum):
    """How one step of the ladder is done."""

    UNPAUSE = "unpause"  # its VM is there
    MEMORY = "memory"  # a snapshot, whole: memory and disk of one instant
    OWN_DISK = "own disk"  # cold boot from the disk that its last VM left
    SNAPSHOT_DISK = "snapshot disk"  # cold boot from the disk part of a snapshot


@dataclass(frozen=True)
class Step:
    """One way to try. `snapshot` is the one it uses, "" for none."""

    way: Way
    snapshot: str = ""


@dataclass(frozen=True)
class Remains:
    """What is left of a machine. `snapshots`: to be tried, best first; `own_disk`: its last VM left a disk."""

    state: str
    snapshots: tuple[str, ...]
    own_disk: bool


def plan(remains: Remains, rungs: frozenset[int]) -> tuple[Step, ...]:
    """Return the ways to try, in order, out of the rungs that are allowed.

    Warmest first. Of the two disks the machine's own comes first: it is never older than that of a snapshot. A parked
    machine has one way only, since every other would end the memory that is still there.
    """
    if remains.state == PAUSED:
        return (Step(Way.UNPAUSE),) if 1 in rungs else ()
    steps: list[Step] = []
    if MEMORY_RUNGS & rungs:
        steps += [Step(Way.MEMORY, one) for one in remains.snapshots]
    if 4 in rungs:
        steps += [Step(Way.OWN_DISK)] if remains.own_disk else []
        steps += [Step(Way.SNAPSHOT_DISK, one) for one in remains.snapshots]
    return tuple(steps)


def falls(error: RecessError) -> bool:
    """Tell whether a step that failed so can never work here, so that the next is tried.

    Everything else may work later (a dying VMM, a full disk, a silent store): falling down the ladder for a passing
    fault would lose memory for good.
    """
    return isinstance(error, Corrupt | NotFound | Incompatible | Unsupported)
