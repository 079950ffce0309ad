"""Which snapshots a session has, as of which turn each is, and what they cost: read from its log. Pure but for `read`.

It must know nothing of how snapshots are stored or compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from recess.contextlog.branch import on_branch
from recess.contextlog.contract import ContextLog, Entry, SessionRow
from recess.errors import NotFound
from recess.sessions.waking import stored_of

ENTRIES_MAX = 50_000  # of the log's end
PAGE = 1000


@dataclass(frozen=True)
class Kept:
    """One snapshot. `turn` is the newest turn that had begun, `whole` whether it had also ended. `here`: it is still
    stored. `new_bytes` is what it added to the store, `standstill_s` how long the machine stood still."""

    snapshot: str
    position: int
    turn: int
    whole: bool
    why: str
    ts: float
    here: bool
    new_bytes: int
    standstill_s: float


def kept(entries: Iterable[Entry], stored: Collection[str]) -> list[Kept]:
    """Return the snapshots that a log's branch names, oldest first."""
    found, turn, whole = [], 0, True
    for entry in on_branch(list(entries)):
        if entry.kind == "turn.start":
            turn, whole = entry.turn, False
        elif entry.kind == "turn.end":
            turn, whole = entry.turn, True
        elif entry.kind == "machine.snapshot":
            one, figures = stored_of(entry), entry.body.get("figures")
            costs = figures if isinstance(figures, dict) else {}
            found.append(
                Kept(
                    one.snapshot, entry.position, turn, whole, str(entry.body.get("why", "")), entry.ts,
                    one.snapshot in stored, int(_number(costs, "new_bytes")), _number(costs, "standstill_s"),
                )
            )  # fmt: skip
    return found


def as_of(snapshots: Sequence[Kept], turn: int) -> Kept:
    """Return the newest stored snapshot that is not newer than the end of a turn. Raises NotFound."""
    fitting = [one for one in snapshots if one.here and one.turn <= turn]
    if not fitting:
        raise NotFound(
            f"no snapshot of turn {turn} or before is stored", hint='@agent(snapshot="turn") keeps one of each turn'
        )
    return fitting[-1]


async def read(log: ContextLog, row: SessionRow) -> list[Entry]:
    """Return the end of a session's log, at most ENTRIES_MAX entries."""
    entries: list[Entry] = []
    after = max(0, row.head - ENTRIES_MAX)
    while page := await log.read(row.id, after=after, to=row.head, limit=PAGE):
        entries += page
        after = page[-1].position
    return entries


def _number(figures: dict[str, Any], name: str) -> float:
    value = figures.get(name, 0)
    return value if isinstance(value, int | float) else 0
