"""Replies that were cut off while they were streamed, and what stands for them in a transcript.

The log is append-only: the cut reply stays, and a later one that `replaces` it stands for it. Pure; the agent has its own copy
of the rule (`recess_agent.cut_replies`), and a property test holds the two equal on any log. It must know no storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recess.contextlog.contract import Entry


def replaced_by(kind: str, body: Mapping[str, Any]) -> int:
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
    return replace(entry, body={**entry.body, **said})
