"""What the inbox means to a session: which messages wait, which were sent into the open turn, and what must stop. Pure.

Everything up to `seen` was looked at; what of it is still to be done is in the other fields. It must know nothing of
where entries are stored or how a turn is cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from recess.contextlog.contract import Entry
from recess.sessions.facts import TurnFacts

QUEUE, STEER, INTERRUPT = "queue", "steer", "interrupt"
MODES = (QUEUE, STEER, INTERRUPT)


@dataclass(frozen=True)
class Inbox:
    """Positions of entries. `queue`: messages whose turn has not begun, in order. `steers`: sent into the open turn, not
    yet known to be seen by its model. `cancel`: what asks to stop the open turn (or, if none is open, the next one)."""

    seen: int = 0
    queue: tuple[int, ...] = ()
    steers: tuple[int, ...] = ()
    cancel: int = 0
    why: str = ""  # of the cancel, for the log


def arrive(inbox: Inbox, entry: Entry, facts: TurnFacts) -> Inbox:
    """Return the inbox after one more entry. One that was seen before changes nothing."""
    if entry.position <= inbox.seen:
        return inbox
    inbox = replace(inbox, seen=entry.position)
    at_work = facts.open and entry.position > facts.inbox
    mode = entry.body.get("mode")
    if entry.position <= (facts.dealt if entry.kind == "cancel" else facts.shown if mode == STEER else 0):
        return inbox  # the turn that ended last has dealt with it; the crash came before the row said so
    if entry.kind == "cancel":
        aimed = entry.body.get("turn")
        if (at_work and aimed in (None, facts.turn)) or (not facts.open and inbox.queue and aimed is None):
            return replace(inbox, cancel=entry.position, why=str(entry.body.get("reason") or "cancelled")[:500])
        return inbox  # what it was about has ended: a late stop stops nothing else
    if entry.kind != "user":
        return inbox
    if mode == STEER and at_work:
        return replace(inbox, steers=(*inbox.steers, entry.position))
    inbox = replace(inbox, queue=(*inbox.queue, entry.position))
    if mode == INTERRUPT and at_work:
        return replace(inbox, cancel=entry.position, why="a newer message interrupted it")
    return inbox


def nothing_new(inbox: Inbox, facts: TurnFacts, *, consumed: int, due: float | None, now: float) -> bool:
    """Tell whether a session that was put away in the middle of a turn need not be woken for what came after `consumed`:
    messages that wait for their own turn, while its agent waits for something else."""
    waits = facts.open and not facts.cut and bool(facts.asks or facts.spawned or facts.timers)
    heard = any(one.position > consumed for one in facts.answers.values())
    return waits and not heard and not inbox.cancel and not inbox.steers and (due is None or due > now)


def restored(consumed: int, queued: Iterable[int], facts: TurnFacts) -> Inbox:
    """Return the inbox of a session that is taken up: `queued` are messages up to `consumed` that had to wait when it was
    put away. One whose turn has begun since (the crash came before the row said so) is not among them."""
    begun = facts.inbox if facts.turn else 0
    return Inbox(seen=consumed, queue=tuple(sorted({one for one in queued if begun < one <= consumed})))


def begun(inbox: Inbox) -> Inbox:
    """Return the inbox after the turn of its first message has begun."""
    return replace(inbox, queue=inbox.queue[1:])


def ended(inbox: Inbox, *, shown: int) -> Inbox:
    """Return the inbox after the open turn ended: steering messages that its model has not seen (it saw up to `shown`)
    wait for a turn of their own, in the order in which all came."""
    late = tuple(one for one in inbox.steers if one > shown)
    return replace(inbox, queue=tuple(sorted({*inbox.queue, *late})), steers=(), cancel=0, why="")
