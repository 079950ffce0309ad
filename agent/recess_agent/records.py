"""An application's own records in the session's log: appended durably, read back from the branch that is current.

What frameworks keep between runs goes here (`memory_*.py`). The model never sees a record; a fork has those of before it, a
rewind takes back those of after it. Records of before a compaction (`Session.compact`) are in the log and not in here any
more: who keeps memory this way compacts by the framework's own means.
"""

from __future__ import annotations

from typing import Any

from recess_agent.recovery_notes import Entry
from recess_agent.session import Session
from recess_agent.transcript import on_branch
from recess_agent.upcasting import refuse_newer

Json = dict[str, Any]


class Records:
    """Records of one kind, `x.KIND` in the log (small letters, digits, `_.-`)."""

    def __init__(self, session: Session, kind: str) -> None:
        self._session = session
        self._kind = f"x.{kind}"

    async def add(self, **data: Any) -> None:
        """Append one; durable when it returns. It knows which attempt of which turn wrote it."""
        turn = self._session.at_turn
        await self._session.record(self._kind, {**data, "attempt": turn.attempt if turn else 0})

    def all(self, *, of_cut_attempts: bool = True, newer: str = "raise") -> list[Json]:
        """Return them in order, in today's shape (`Agent.upcast`). Without `of_cut_attempts`, those are left out that an attempt of
        a turn wrote which a crash cut: the next attempt says the same things again. One that newer code wrote, which was rolled
        back since, raises NewerEntry, or is left out with `newer="skip"`. Raises UpcastError."""
        log = self._session.log
        current = {one.position for one in on_branch([_entry(one) for one in log])}
        last: dict[int, int] = {}  # turn -> its newest attempt
        for one in log:
            if one["kind"] == "turn.start":
                last[one["turn"]] = max(last.get(one["turn"], 0), int(one["body"].get("attempt", 1)))
        out = []
        for one in log:
            if one["kind"] != self._kind or one["position"] not in current:
                continue
            if one.get("newer"):
                if newer == "skip":
                    continue
                raise refuse_newer(one, self._session.schema_of(self._kind))
            if of_cut_attempts or int(one["body"].get("attempt", 0)) >= last.get(one["turn"], 0):
                out.append(dict(one["body"]))
        return out


def _entry(data: Json) -> Entry:
    return Entry(str(data.get("session", "")), int(data["position"]), data["kind"], data["body"], data.get("ref") or "")
