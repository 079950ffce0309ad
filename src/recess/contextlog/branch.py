"""What of a log is on its present branch: rewinds and the newest compaction honoured. Pure; it must know no storage.

A rewind at position p to t hides (t, p): what was said there is kept and no longer counts. A rewind that is itself hidden
does nothing, so "rewind to t" always brings back the view as it was at t. A compaction stands for everything up to its
`to`, except the newest system entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recess.contextlog.contract import Entry

_FAR = 1 << 62


@dataclass(frozen=True)
class Mark:
    """A system, compact or rewind entry, reduced to what decides the branch. `to` is 0 for system entries."""

    position: int
    kind: str
    to: int


@dataclass(frozen=True)
class TailPlan:
    """Read everything after `after`, and the system entry at `system` (0: none) if it is not among that."""

    after: int
    system: int


def plan_tail(marks_newest_first: Iterable[Mark]) -> TailPlan:
    """Decide where the tail begins; takes no more marks than it needs."""
    upper = _FAR
    after: int | None = None
    system = 0
    for mark in marks_newest_first:
        if mark.position > upper:
            continue
        if mark.kind == "rewind":
            upper = min(upper, mark.to)
        elif mark.kind == "compact" and after is None:
            after = min(mark.to, mark.position - 1)
        elif mark.kind == "system" and not system:
            system = mark.position
        if after is not None and system:
            break
    return TailPlan(after or 0, system)


def mark_of(entry: Entry) -> Mark | None:
    """Return the entry as a mark, or None if it is no mark (or one whose `to` is unreadable: it then does nothing)."""
    if entry.kind == "system":
        return Mark(entry.position, entry.kind, 0)
    if entry.kind in ("compact", "rewind"):
        to = entry.body.get("to")
        if isinstance(to, int) and 0 <= to < entry.position:
            return Mark(entry.position, entry.kind, to)
    return None


def on_branch(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that no rewind hides, in order; rewinds themselves are kept."""
    upper = _FAR
    kept: list[Entry] = []
    for entry in reversed(entries):
        if entry.position > upper:
            continue
        kept.append(entry)
        if entry.kind == "rewind" and (mark := mark_of(entry)):
            upper = min(upper, mark.to)
    kept.reverse()
    return kept


def model_view(entries: Sequence[Entry]) -> tuple[Entry | None, Entry | None, list[Entry]]:
    """Return (newest system entry, newest compaction, entries after what it stands for), all on the branch."""
    kept = on_branch(entries)
    plan = plan_tail(mark for entry in reversed(kept) if (mark := mark_of(entry)))
    system = next((e for e in kept if e.position == plan.system), None)
    compacts = [e for e in kept if e.kind == "compact" and mark_of(e)]
    return system, (compacts[-1] if compacts else None), [e for e in kept if e.position > plan.after]
