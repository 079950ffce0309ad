"""A session's log as a trace: which spans an entry ends. Pure but for the memory of what is open.

A session is one trace, whatever machines, nodes and months it lives through: ids come from the session and its positions alone, so
whoever drives it goes on with the same trace, and what a crash made two servers say is the same span twice. Times are the
log's. A turn that was frozen in the middle is one span with the freeze in it. It must know nothing of exporters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recess.contextlog.contract import Entry

OUTCOMES = ("tool.result", "tool.settled", "tool.doubt")
Value = str | int | float | bool


@dataclass(frozen=True)
class Span:
    """Something that took time. Times in wall seconds, ids as OpenTelemetry has them (128 and 64 bits); `parent` 0: none."""

    trace: int
    ident: int
    parent: int
    name: str
    begun_s: float
    ended_s: float
    attributes: Mapping[str, Value]
    error: str = ""


@dataclass
class _Open:
    """What of a session has begun and not ended."""

    turn: Entry | None = None
    attempts: int = 0
    calls: dict[str, Entry] = field(default_factory=dict)
    last_s: float = 0.0  # of the turn's newest entry: the model was at work since then when a reply comes
    away_s: float = 0.0  # since when the machine is put away; 0.0: it is not


def trace_id(session: str) -> int:
    """Return the id of a session's trace."""
    return int.from_bytes(hashlib.blake2b(session.encode(), digest_size=16).digest()) or 1


def span_id(session: str, name: str, position: int) -> int:
    """Return the id of what began (or, where nothing else names it, ended) at a position."""
    data = f"{session}\0{name}\0{position}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


class SpanMaker:
    """Spans of the sessions that this server drives."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def taken_up(self, session: str, entries: Sequence[Entry]) -> None:
        """Learn what is open from the end of a log."""
        self._open[session] = _Open()
        for entry in entries:
            self.saw(session, entry)

    def saw(self, session: str, entry: Entry) -> list[Span]:
        """Return the spans that this entry ends."""
        state = self._open.setdefault(session, _Open())
        made = self._ended_by(session, entry, state)
        if entry.turn:
            state.last_s = entry.ts
        return made

    def _ended_by(self, session: str, entry: Entry, state: _Open) -> list[Span]:
        match entry.kind:
            case "turn.start":
                if state.turn is None or state.turn.turn != entry.turn:
                    state.turn, state.calls, state.attempts = entry, {}, 0
                state.attempts += 1
            case "tool.start":
                state.calls[entry.ref] = entry
            case "assistant" if state.last_s:
                return [self._reply(session, entry, state)]
            case kind if kind in OUTCOMES and entry.ref in state.calls:
                return [self._call(session, entry, state)]
            case "machine.snapshot":
                return [self._snapshot(session, entry, state)]
            case "machine.restore":
                return self._restored(session, entry, state)
            case "turn.end" if state.turn is not None:
                return [self._turn(session, entry, state)]
        return []

    def _span(
        self, session: str, name: str, at: int, begun_s: float, ended_s: float, state: _Open, error: str = "", **more: Value
    ) -> Span:  # fmt: skip
        turn = state.turn
        parent = span_id(session, "turn", turn.position) if turn is not None and not name.startswith("turn") else 0
        about: dict[str, Value] = {"recess.session": session, "recess.position": at}
        if turn is not None:
            about["recess.turn"] = turn.turn
        ident = span_id(session, name.split(" ")[0], at)
        about |= {f"recess.{key}": value for key, value in more.items()}
        return Span(trace_id(session), ident, parent, name, min(begun_s, ended_s), ended_s, about, error)

    def _reply(self, session: str, entry: Entry, state: _Open) -> Span:
        calls, model = entry.body.get("tool_calls"), entry.body.get("model")
        usage = entry.body.get("usage")
        tokens = {k: v for k, v in usage.items() if isinstance(v, int)} if isinstance(usage, Mapping) else {}
        more: dict[str, Value] = {"calls": len(calls) if isinstance(calls, list) else 0, **tokens}
        if isinstance(model, str):
            more["model"] = model
        error = "the reply was cut" if entry.body.get("partial") is True else ""
        return self._span(session, "model", entry.position, state.last_s, entry.ts, state, error, **more)

    def _call(self, session: str, entry: Entry, state: _Open) -> Span:
        start = state.calls.pop(entry.ref)
        name, doubt = str(start.body.get("name", ""))[:100], entry.kind == "tool.doubt"
        error = "outcome unknown" if doubt else "failed" if entry.body.get("error") else ""
        return self._span(
            session, f"tool {name}", start.position, start.ts, entry.ts, state, error,
            effect=str(start.body.get("effect", "")), outcome=entry.kind.removeprefix("tool."),
        )  # fmt: skip

    def _snapshot(self, session: str, entry: Entry, state: _Open) -> Span:
        figures = entry.body.get("figures")
        costs = figures if isinstance(figures, Mapping) else {}
        more: dict[str, Value] = {k: v for k, v in costs.items() if isinstance(v, int | float)}
        if entry.body.get("away") is True:
            state.away_s = entry.ts
        took = costs.get("durable_s")
        begun = entry.ts - took if isinstance(took, int | float) else entry.ts
        why = str(entry.body.get("why", ""))
        return self._span(session, "snapshot", entry.position, begun, entry.ts, state, "", **{"why": why, **more})

    def _restored(self, session: str, entry: Entry, state: _Open) -> list[Span]:
        seconds = entry.body.get("seconds")
        begun = entry.ts - (float(seconds) if isinstance(seconds, int | float) else 0.0)
        more: dict[str, Value] = {
            name: value for name in ("rung", "why", "stale", "bytes_read")
            if isinstance(value := entry.body.get(name), str | int | float)
        }  # fmt: skip
        spans = [self._span(session, "thaw", entry.position, begun, entry.ts, state, "", **more)]
        if state.away_s:
            spans.insert(0, self._span(session, "frozen", entry.position, state.away_s, begun, state))
            state.away_s = 0.0
        return spans

    def _turn(self, session: str, entry: Entry, state: _Open) -> Span:
        start = state.turn
        if start is None or start.turn != entry.turn:
            state.turn = None
            return self._span(session, f"turn {entry.turn}", entry.position, entry.ts, entry.ts, state)
        status, error = str(entry.body.get("status", "done")), str(entry.body.get("error", ""))
        told = error or status if status != "done" else ""
        made = self._span(
            session, f"turn {entry.turn}", start.position, start.ts, entry.ts, state, told,
            status=status, attempts=state.attempts, code=entry.code_version,
        )  # fmt: skip
        state.turn, state.calls, state.last_s = None, {}, 0.0
        return made
