"""Reading entries in SQL: which rows and which segments make up a part of a log, within a budget of bytes.

Functions over a `Tx`. What they return is a *plan*, in order: rows as they are, and stretches of segments that somebody with
a blob store still has to read (`reading`). A plan is of one consistent view: an entry is in a row or in a segment, never in
both and never in neither, because sealing is one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recess.contextlog import lineage
from recess.contextlog.branch import Mark
from recess.contextlog.lineage import Range
from recess.contextlog.segments import Segment
from recess.contextlog.sql_tx import ENTRY, SessionState, may_be_sealed, sealed_inbox
from recess.db import Row, Tx

_MARKS_AT_ONCE = 64
_ROWS_AT_ONCE = 256  # of at most 16 KiB each: what a reader may hold beyond its budget


@dataclass(frozen=True)
class Sealed:
    """The entries `first` to `last` of a segment; with `only`, these of them."""

    segment: Segment
    first: int
    last: int
    only: frozenset[int] | None = None


Plan = list[Row | Sealed]


def entries_in(tx: Tx, state: SessionState, after: int, to: int, max_bytes: int | None = None) -> Plan:
    """Return the plan for after < position <= to, lineage included. With `max_bytes` it may end early: once the rows hold
    that much, but never before the first entry."""
    plan: Plan = []
    left = max_bytes
    for part in lineage.clip(state.ranges, after, to):
        first = part.first
        if may_be_sealed(state, part):
            for segment in segments_in(tx, part):
                plan.append(Sealed(segment, max(part.first, segment.first), min(part.last, segment.last)))
                first = max(first, segment.last + 1)
        while first <= part.last:
            rows = tx.execute(
                f"SELECT {ENTRY} FROM log_entry WHERE session = ? AND position BETWEEN ? AND ? ORDER BY position LIMIT ?",
                (part.owner, first, part.last, _ROWS_AT_ONCE),
            )
            plan += rows
            if left is not None:
                left -= sum(int(row["size"]) for row in rows)
            if (left is not None and left <= 0) or len(rows) < _ROWS_AT_ONCE:
                break
            first = int(rows[-1]["position"]) + 1
        if left is not None and left <= 0:
            break
    return plan


def segments_in(tx: Tx, part: Range) -> list[Segment]:
    """Return the segments that hold any of a range's entries, in order."""
    rows = tx.execute(
        "SELECT session, first, last, key, hash, size FROM log_segment WHERE session = ? AND last >= ? AND first <= ? "
        "ORDER BY first",
        (part.owner, part.first, part.last),
    )
    return [segment_of(row) for row in rows]


def segment_of(row: Row) -> Segment:
    """Return the segment that a row names."""
    return Segment(
        str(row["session"]), int(row["first"]), int(row["last"]), str(row["key"]), str(row["hash"]), int(row["size"])
    )


def inbox_in(tx: Tx, state: SessionState, after: int) -> Plan:
    """Return the plan for the inbox entries after a position, lineage included."""
    plan: Plan = []
    for part in lineage.clip(state.ranges, after, state.row.head):
        if may_be_sealed(state, part):
            inbox = frozenset(sealed_inbox(tx, part))
            for segment in segments_in(tx, part) if inbox else ():
                only = frozenset(at for at in inbox if segment.first <= at <= segment.last)
                if only:
                    plan.append(Sealed(segment, min(only), max(only), only))
        plan += tx.execute(
            f"SELECT {ENTRY} FROM log_entry WHERE session = ? AND position BETWEEN ? AND ? "
            "AND kind IN ('user', 'answer', 'cancel') ORDER BY position",
            (part.owner, part.first, part.last),
        )
    return plan


def marks_in(tx: Tx, state: SessionState) -> Iterator[Mark]:
    """Yield the marks newest first, a few at a time."""
    for part in reversed(state.ranges):
        last = part.last
        while last >= part.first:
            rows = tx.execute(
                "SELECT position, kind, mark FROM log_mark WHERE session = ? AND position BETWEEN ? AND ? "
                "ORDER BY position DESC LIMIT ?",
                (part.owner, part.first, last, _MARKS_AT_ONCE),
            )
            for row in rows:
                yield Mark(int(row["position"]), str(row["kind"]), int(row["mark"]))
            if len(rows) < _MARKS_AT_ONCE:
                break
            last = int(rows[-1]["position"]) - 1
