"""The transcript of a log that grows: what no later entry is likely to change is made once and kept.

Without it each call of a model would cost the session's whole past again. It gives what `transcript.messages` gives, on any log (a
property test holds them equal): what could still change a kept part is remembered with it, and an entry that does has the whole
made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recess_agent.cut_replies import replaced_by
from recess_agent.lent import Lent
from recess_agent.quiet import no_collection
from recess_agent.transcript import Message, build

_REMAKES = ("system", "compact", "rewind")
_ENDS_CALLS = ("answer", "tool.start", "tool.result", "tool.settled", "tool.doubt")


class Settled:
    """The transcript of one log in one format: `shape` makes neutral messages into it, message by message."""

    def __init__(self, shape: Callable[[Sequence[Message]], list[Message]]) -> None:
        self._shape = shape
        self._forget([])

    def _forget(self, log: Sequence[Mapping[str, Any]]) -> None:
        self._log = log
        self._looked = 0  # entries of it that were looked at
        self._kept = 0  # entries that the kept messages are made of
        self._tried = 0
        self._messages: list[Message] = []
        # Of the kept part, or of more: calls without an outcome or with a doubt, users' messages that no turn has begun with.
        self._open: set[str] = set()
        self._loose: set[int] = set()

    def messages(self, log: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Return `shape(transcript.messages(log))`; what you do with it changes nothing here. Cheap for the list of the last call,
        grown."""
        if log is not self._log or len(log) < self._looked or self._remade_by(log[self._looked :], self._kept):
            self._forget(log)
        self._looked = len(log)
        with no_collection():
            self._settle()
        return Lent(self._messages, self._shape(build(log[self._kept :]).messages), _copy)

    def _settle(self) -> None:
        """Keep what ends with the newest end of a turn, if it is settled."""
        log = self._log
        ends = next((n for n in range(len(log), self._kept, -1) if log[n - 1]["kind"] == "turn.end"), 0)
        if ends <= self._tried:
            return
        self._tried = ends
        part = build(log[self._kept : ends])
        self._open |= part.open
        self._loose |= part.loose
        if part.settled and not self._remade_by(log[ends:], ends):
            self._kept = ends
            self._messages += self._shape(part.messages)

    def _remade_by(self, entries: Sequence[Mapping[str, Any]], kept: int) -> bool:
        """Tell whether one of these entries changes what the first `kept` entries of the log were made into."""
        last = self._log[kept - 1]["position"] if kept else 0
        for entry in entries:
            kind = entry["kind"]
            if kind == "turn.start":
                inbox = entry["body"].get("inbox")
                remade = isinstance(inbox, int) and inbox in self._loose
            elif kind == "assistant":
                remade = 0 < replaced_by(kind, entry["body"]) <= last
            else:
                remade = kind in _REMAKES or (kind in _ENDS_CALLS and (entry.get("ref") or "") in self._open)
            if remade:
                return True
        return False


def _copy(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [{k: dict(v) if k == "function" else v for k, v in c.items()} for c in calls]}
