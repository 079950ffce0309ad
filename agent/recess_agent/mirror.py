"""The agent's copy of its session's log, in memory, so that `messages()` is synchronous.

The host sends every entry this process did not write itself; own entries are added when their position is known. The
copy is part of the machine's memory: a snapshot keeps it, and after a thaw only what is newer is sent.
"""

from __future__ import annotations

from typing import Any

from recess_agent.cut_replies import replaced_by

Entry = dict[str, Any]


class Mirror:
    """Entries in order of position, since the newest compaction. An entry: {session, position, kind, body, turn, ref, ts}."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.position = 0
        self._calls: set[str] = set()
        self._parts: tuple[int, int] = (0, 0)  # the newest turn that replied, and the number of its next reply

    def add(self, entry: Entry) -> None:
        """Take one entry; what is already here is skipped (a repeated append, a repeated push)."""
        position = int(entry["position"])
        if position <= self.position:
            return
        self.entries.append(entry)
        self.position = position
        if entry["kind"] == "assistant":
            self._calls.update(str(call.get("id")) for call in entry["body"].get("tool_calls") or [])
            following = int(entry["body"].get("part", 0)) + 1
            turn, known = self._parts
            self._parts = (entry["turn"], max(known, following) if turn == entry["turn"] else following)
        elif entry["kind"] == "compact":
            self._forget(entry)

    def _forget(self, compact: Entry) -> None:
        """Drop what a compaction stands for, so that this memory, which every snapshot holds, does not grow for ever. The
        newest system entry stays, as in the host's tail."""
        to = compact["body"].get("to")
        if isinstance(to, int) and to < compact["position"]:
            systems = [e for e in self.entries if e["kind"] == "system" and e["position"] <= to]
            self.entries = systems[-1:] + [e for e in self.entries if e["position"] > to]

    def call_ids(self) -> set[str]:
        """Return the ids of all tool calls of this session."""
        return self._calls

    def cut_replies(self, turn: int) -> list[Entry]:
        """Return the turn's replies that were cut and that nothing stands for, oldest first."""
        found: list[Entry] = []
        stood_for: set[int] = set()
        for entry in reversed(self.entries):
            if entry["kind"] == "turn.end":
                break
            if entry["turn"] == turn and entry["kind"] == "assistant":
                stood_for.add(replaced_by("assistant", entry["body"]))
                if entry["body"].get("partial") is True and entry["position"] not in stood_for:
                    found.append(entry)
        return found[::-1]

    def next_part(self, turn: int) -> int:
        """Return the number of the turn's next reply, counting on over attempts."""
        return self._parts[1] if self._parts[0] == turn else 0
