"""What a stretch of the log says about the turn at work: a fold over entries, pure.

It must never know of machines, sockets or time; positions and kinds are all it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from recess.contextlog.contract import INBOX_KINDS, Entry

OOM = "oom"  # the cause of a turn.cut: the process was ended for want of memory
SPAWN = "x.spawn"  # a child session was started; its report comes as the answer of the same ref

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
class Answer:
    """What came in for an `ask`, or a child's report."""

    position: int
    body: Mapping[str, Any]


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
    last_outcome: int = 0  # of a tool call
    keys: Mapping[str, int] = field(default_factory=dict)  # of entries seen, also a forked parent's: key -> position
    asks: Mapping[str, Entry] = field(default_factory=dict)  # questions of this turn: ref -> entry
    spawned: frozenset[str] = frozenset()  # refs of children started in this turn
    timers: Mapping[str, float] = field(default_factory=dict)  # of this turn: ref -> due (wall seconds)
    answers: Mapping[str, Answer] = field(default_factory=dict)  # of this turn: ref -> what came in
    dealt: int = 0  # the turn that ended last had obeyed every stop up to here
    shown: int = 0  # and its model had seen every steering message up to here
    steps: int = 0  # of this turn, all attempts: model replies and tool calls
    output_bytes: int = 0  # of this turn, all attempts: what the agent said and its tools returned
    oom_bytes: int = 0  # memory of the machine in which the newest attempt was cut by want of it; 0: it was not


_NOTHING_OPEN: dict[str, Any] = {
    "open": False, "cut": False, "calls": {}, "asks": {}, "spawned": frozenset(), "timers": {}, "answers": {},
    "steps": 0, "output_bytes": 0, "oom_bytes": 0,
}  # fmt: skip


def observe(facts: TurnFacts, entry: Entry) -> TurnFacts:
    """Return the facts after one more entry."""
    if entry.key and entry.kind not in INBOX_KINDS:
        facts = replace(facts, keys={**facts.keys, entry.key: entry.position})
    if is_work(entry.kind):
        facts = replace(facts, last_work=entry.position)
    if facts.open and entry.turn == facts.turn and _is_said(entry.kind):
        steps = facts.steps + (entry.kind in ("assistant", "tool.start"))
        facts = replace(facts, steps=steps, output_bytes=facts.output_bytes + _size(entry.body))
    match entry.kind:
        case "turn.start":
            return _started(facts, entry)
        case "turn.cut":
            oom = entry.body.get("memory_bytes") if entry.body.get("cause") == OOM else 0
            return replace(facts, cut=True, cuts=facts.cuts + 1, oom_bytes=oom if isinstance(oom, int) else 0)
        case "turn.end":
            dealt, shown = int(entry.body.get("dealt", 0)), int(entry.body.get("shown", 0))
            return replace(facts, **{**_NOTHING_OPEN, "dealt": dealt, "shown": shown})
        case "rewind":
            return replace(facts, **_NOTHING_OPEN)
        case "fork" if "parent" in entry.body:
            # The child of a fork in mid-turn does not go on with its parent's turn: it waits for its own message.
            return replace(facts, **_NOTHING_OPEN)
        case "ask":
            return replace(facts, asks={**facts.asks, entry.ref: entry})
        case "timer":
            return replace(facts, timers={**facts.timers, entry.ref: _due(entry)})
        case "answer":
            return replace(facts, answers={**facts.answers, entry.ref: Answer(entry.position, entry.body)})
        case kind if kind == SPAWN:
            return replace(facts, spawned=facts.spawned | {entry.ref})
        case "tool.start":
            return replace(facts, calls={**facts.calls, entry.ref: _open_call(entry)})
        case "tool.result" | "tool.settled" | "tool.doubt":
            calls = {ref: call for ref, call in facts.calls.items() if ref != entry.ref}
            return replace(facts, calls=calls, last_outcome=entry.position)
        case _:
            return facts


def _started(facts: TurnFacts, entry: Entry) -> TurnFacts:
    began: dict[str, Any] = {
        "turn": entry.turn, "attempt": int(entry.body.get("attempt", 1)), "inbox": int(entry.body.get("inbox", 0)),
        "started": entry.position,
    }  # fmt: skip
    if facts.turn == entry.turn:
        return replace(facts, **{**began, "open": True, "cut": False, "oom_bytes": 0})
    keys = {entry.key: entry.position} if entry.key else {}
    return replace(facts, **{**_NOTHING_OPEN, **began, "open": True, "cuts": 0, "keys": keys})


def _due(entry: Entry) -> float:
    due = entry.body.get("due")
    return float(due) if isinstance(due, int | float) else 0.0


def _is_said(kind: str) -> bool:
    """Tell whether an entry of this kind is the agent's own saying or doing."""
    return kind in ("assistant", "tool.start", "tool.result", "tool.settled", "note", "compact", "ask") or (
        kind.startswith("x.") and kind != SPAWN
    )


def _size(body: Mapping[str, Any]) -> int:
    """Return about how many bytes a body takes. Cheap: only its texts count, two levels deep."""
    total = 0
    for value in body.values():
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping | list):
            total += len(str(value))
    return total


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
