"""The agent's copy of its session's log, in memory, so that `messages()` is synchronous.

The host sends every entry this process did not write itself; own entries are added when their position is known. The
copy is part of the machine's memory: a snapshot keeps it, and after a thaw only what is newer is sent.
"""

from __future__ import annotations

from typing import Any

Entry = dict[str, Any]


class Mirror:
    """Entries in order of position. An entry: {session, position, kind, body, turn, ref, ts}."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.position = 0
        self._calls: set[str] = set()

    def add(self, entry: Entry) -> None:
        """Take one entry; what is already here is skipped (a repeated append, a repeated push)."""
        position = int(entry["position"])
        if position <= self.position:
            return
        self.entries.append(entry)
        self.position = position
        if entry["kind"] == "assistant":
            self._calls.update(str(call.get("id")) for call in entry["body"].get("tool_calls") or [])

    def call_ids(self) -> set[str]:
        """Return the ids of all tool calls of this session."""
        return self._calls

    def next_part(self, turn: int) -> int:
        """Return the number of the turn's next reply, counting on over attempts."""
        parts = [int(e["body"].get("part", 0)) for e in self.entries if e["turn"] == turn and e["kind"] == "assistant"]
        return max(parts, default=-1) + 1
