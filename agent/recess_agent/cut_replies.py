"""Replies that were cut off while they were streamed, and what an agent makes of them: keep, rewrite, drop, or have the model go on.

The log is append-only: the cut reply stays, and a later one that `replaces` it stands for it in the transcript. `mended` is
pure; the host's copy of it is in `recess.contextlog.cut_replies`, and a property test holds the two equal on any log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from recess_agent.recovery_notes import Entry

GO_ON = "Your reply was cut off there. Go on exactly where it ends; repeat nothing."


class Repair(NamedTuple):
    """What stands for a cut reply: `text` ("" for none of it) and, with `ask`, a note to the model behind it."""

    text: str
    ask: str = ""


class CutReply(NamedTuple):
    """What `on_cut_reply` is given. `why`: "crash" (the process or the machine was lost while it streamed), or what the model's
    client raised. Return one of the methods' values; None keeps it as it is, which is what happens without a hook."""

    text: str
    why: str
    turn: int
    position: int

    def drop(self) -> Repair:
        """The model sees nothing of it."""
        return Repair("")

    def rewrite(self, text: str) -> Repair:
        """The model sees this in its place."""
        return Repair(text)

    def go_on(self, ask: str = GO_ON) -> Repair:
        """The model sees it, and is asked to go on where it ends."""
        return Repair(self.text, ask)


def replaced_by(kind: str, body: Any) -> int:
    """Return the position of the reply that an entry stands for, 0 if it stands for none."""
    position = body.get("replaces") if kind == "assistant" else None
    return position if isinstance(position, int) and not isinstance(position, bool) else 0


def mended(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries with what stands for each cut reply in its place."""
    cut = {e.position for e in entries if e.kind == "assistant" and e.body.get("partial") is True}
    stands: dict[int, Entry] = {}
    gone: set[int] = set()
    for entry in entries:
        position = replaced_by(entry.kind, entry.body)
        if position in cut and position < entry.position:
            stands[position] = entry
            gone.add(entry.position)
    if not stands:
        return list(entries)
    return [_stood_for(e, stands.get(e.position)) for e in entries if e.position not in gone]


def _stood_for(entry: Entry, by: Entry | None) -> Entry:
    if by is None:
        return entry
    said = {"text": by.body.get("text"), "ask": by.body.get("ask")}
    return entry._replace(body={**entry.body, **said})
