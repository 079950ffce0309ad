"""What a turn may wait for while its machine is put away: an answer, a child's report, a time. Pure.

An agent names the refs it waits for; the log says what came. It must know nothing of sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from recess.sessions.facts import TurnFacts


def known(facts: TurnFacts, ref: str) -> bool:
    """Tell whether this turn has asked, set or spawned something under this ref."""
    return ref in facts.asks or ref in facts.timers or ref in facts.spawned


def outcome(facts: TurnFacts, refs: Sequence[str], now: float) -> dict[str, Any] | None:
    """Return what ends a wait for any of these refs, or None. What came in goes before a time that has passed: an answer
    given in time is not lost to a machine that woke up late. `now` in wall seconds."""
    for ref in refs:
        answer = facts.answers.get(ref)
        if answer is not None:
            return {"ref": ref, "position": answer.position, "body": dict(answer.body)}
    for ref in refs:
        due = facts.timers.get(ref)
        if due is not None and due <= now:
            return {"ref": ref, "due": due}
    return None


def next_due(facts: TurnFacts, waits: Iterable[Sequence[str]]) -> float | None:
    """Return the earliest time (wall seconds) at which one of these waits ends by itself, None if none does."""
    return min((facts.timers[ref] for refs in waits for ref in refs if ref in facts.timers), default=None)
