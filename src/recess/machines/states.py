"""The state machine of machines: one table, and a guard that says what was illegal and why. Pure.

created    claimed and checked, never started
creating   its VM is being started; nothing is served yet
running    thawed and served
paused     vCPUs stopped, memory held (a session's parked state)
suspended  no VM; its newest snapshot brings it back under its identity
exited     its main process has ended, or it was stopped
dead       lost or killed; a snapshot brings it back, or its disk without its memory, if there is one
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from recess.errors import IllegalState

CREATED: Final = "created"
CREATING: Final = "creating"
RUNNING: Final = "running"
PAUSED: Final = "paused"
SUSPENDED: Final = "suspended"
EXITED: Final = "exited"
DEAD: Final = "dead"

DAMAGED: Final = "damaged"
"""Not a state of a machine but of its row: shown instead of one when the row cannot be read. Only `remove` takes it."""

STALLED: Final = "stalled"
"""Not a state of a row but of a running VM: shown instead of "running" while the host's disk has no room for its writes."""

STATES: Final = (CREATED, CREATING, RUNNING, PAUSED, SUSPENDED, EXITED, DEAD)
WITH_VM: Final = (CREATING, RUNNING, PAUSED)
WITHOUT_VM: Final = (CREATED, SUSPENDED, EXITED, DEAD)

MOVES: Final[Mapping[str, Mapping[str, str]]] = {
    "start": {CREATED: RUNNING, CREATING: RUNNING},
    "use": {RUNNING: RUNNING},
    "pause": {RUNNING: PAUSED},
    "unpause": {PAUSED: RUNNING},
    "snapshot": {RUNNING: RUNNING, PAUSED: PAUSED},
    "suspend": {RUNNING: SUSPENDED, PAUSED: SUSPENDED},
    "evict": {PAUSED: SUSPENDED},
    "resume": {PAUSED: RUNNING, SUSPENDED: RUNNING},
    "restore": {SUSPENDED: RUNNING, EXITED: RUNNING, DEAD: RUNNING},
    "bring back": {PAUSED: RUNNING, SUSPENDED: RUNNING, EXITED: RUNNING, DEAD: RUNNING},
    "exit": {RUNNING: EXITED, PAUSED: EXITED},
    "stop": {RUNNING: EXITED, PAUSED: EXITED, SUSPENDED: EXITED, EXITED: EXITED, CREATED: CREATED, DEAD: DEAD},
    "kill": {CREATING: DEAD, RUNNING: DEAD, PAUSED: DEAD, SUSPENDED: DEAD, EXITED: DEAD, DEAD: DEAD},
    "remove": {CREATED: "", SUSPENDED: "", EXITED: "", DEAD: ""},
}

_HINTS: Final[Mapping[tuple[str, str], str]] = {
    ("remove", RUNNING): "stop it first, or use --force",
    ("remove", PAUSED): "stop it first, or use --force",
    ("remove", CREATING): "it is being made; wait, or use --force",
    ("use", SUSPENDED): "bring it back first: recess resume",
    ("use", PAUSED): "let it run first: recess unpause",
    ("use", CREATED): "start it first: recess start",
    ("use", EXITED): "start it again first: recess start",
    ("use", DEAD): "restore one of its snapshots: recess restore",
    ("bring back", CREATED): "it was never started: recess start",
    ("start", PAUSED): "let it run: recess unpause",
    ("resume", DEAD): "it has no snapshot to resume from; restore one of another machine",
    ("resume", RUNNING): "it runs already",
    ("bring back", RUNNING): "it runs already",
}


def next_state(state: str, move: str, who: str = "the machine") -> str:
    """Return the state after a move ("" : the row is gone). Raises IllegalState naming machine, state and move."""
    after = MOVES[move].get(state)
    if after is None:
        allowed = ", ".join(MOVES[move])
        raise IllegalState(
            f"{who} is {state}: cannot {move}",
            hint=_HINTS.get((move, state), f"possible when it is {allowed}"),
            state=state,
            move=move,
        )
    return after


def after_loss(state: str, snapshot: str, reason: str, *, disk: bool = False) -> tuple[str, str]:
    """Decide where a machine falls whose VM is gone without anybody having asked: (state, one line that says it).

    With a snapshot of its own it is suspended, so that `resume` brings it back, and the line says that what came
    after that snapshot is lost; without one it is dead. A machine that was still being made is dead. `disk`: the disk
    of its VM was kept, so that all its files can be had without its memory.
    """
    if state == CREATING:
        return DEAD, f"it was never finished: {reason}"
    if snapshot:
        kept = " but for the files: its disk is kept (resume --disk)" if disk else ""
        return SUSPENDED, f"its VM is gone ({reason}); what came after snapshot {snapshot[:16]} is lost{kept}"
    return DEAD, f"its VM is gone ({reason}) and it had no snapshot{'; its disk is kept' if disk else ''}"
