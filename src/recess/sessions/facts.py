"""What a stretch of the log says about the turn at work: a fold over entries, pure.

It must never know of machines, sockets or time; positions and kinds are all it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from recess.contextlog.contract import Entry

# Entries after which a machine that was captured before them is behind the log: something happened that it has not seen.
# What is not here (user messages, turn.start, turn.cut, machine.*) leaves an agent that waits for its turn as good as new.
WORK_KINDS = frozenset(
    {
        "assistant", "tool.start", "tool.result", "tool.doubt", "tool.settled", "ask", "turn.end", "compact", "rewind",
        "code", "note", "system", "timer",
    }
)  # fmt: skip


def is_work(kind: str) -> bool:
    """Tell whether an entry of this kind makes an older machine stale."""
    return kind in WORK_KINDS or kind.startswith("x.")


@dataclass(frozen=True)
class OpenCall:
    """A tool call that was started and has no outcome. `effect` is what the entry says, "" if it says nothing: whoever
    acts on it must take what it does not know for `once`."""

    call_id: str
    position: int
    name: str
    arguments: Mapping[str, Any]
    effect: str
    verify: bool


@dataclass(frozen=True)
class TurnFacts:
    """The newest turn. `attempt` counts its turn.start entries; `cut` tells that the attempt was cut off."""

    turn: int = 0
    attempt: int = 0
    inbox: int = 0
    started: int = 0  # position of the newest turn.start
    open: bool = False
    cut: bool = False
    cuts: int = 0
    calls: Mapping[str, OpenCall] = field(default_factory=dict)
    last_work: int = 0
    keys: Mapping[str, int] = field(default_factory=dict)  # of entries seen, also a forked parent's: key -> position


def observe(facts: TurnFacts, entry: Entry) -> TurnFacts:
    """Return the facts after one more entry."""
    if entry.key:
        facts = replace(facts, keys={**facts.keys, entry.key: entry.position})
    if is_work(entry.kind):
        facts = replace(facts, last_work=entry.position)
    match entry.kind:
        case "turn.start":
            same = facts.turn == entry.turn
            return replace(
                facts,
                turn=entry.turn,
                attempt=int(entry.body.get("attempt", 1)),
                inbox=int(entry.body.get("inbox", 0)),
                started=entry.position,
                open=True,
                cut=False,
                cuts=facts.cuts if same else 0,
                calls=facts.calls if same else {},
                keys=facts.keys if same else ({entry.key: entry.position} if entry.key else {}),
            )
        case "turn.end":
            return replace(facts, open=False, cut=False, calls={})
        case "turn.cut":
            return replace(facts, cut=True, cuts=facts.cuts + 1)
        case "fork" if "parent" in entry.body:
            # The child of a fork in mid-turn does not go on with its parent's turn: it waits for its own message.
            return replace(facts, open=False, cut=False, calls={})
        case "rewind":
            return replace(facts, open=False, cut=False, calls={})
        case "tool.start":
            return replace(facts, calls={**facts.calls, entry.ref: _open_call(entry)})
        case "tool.result" | "tool.settled" | "tool.doubt":
            return replace(facts, calls={ref: call for ref, call in facts.calls.items() if ref != entry.ref})
        case _:
            return facts


def fold(entries: Iterable[Entry], facts: TurnFacts | None = None) -> TurnFacts:
    """Return the facts after all entries."""
    result = facts or TurnFacts()
    for entry in entries:
        result = observe(result, entry)
    return result


def _open_call(entry: Entry) -> OpenCall:
    arguments = entry.body.get("arguments")
    return OpenCall(
        call_id=entry.ref,
        position=entry.position,
        name=str(entry.body.get("name", "")),
        arguments=dict(arguments) if isinstance(arguments, Mapping) else {},
        effect=str(entry.body.get("effect", "")),
        verify=bool(entry.body.get("verify", False)),
    )
