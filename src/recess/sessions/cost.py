"""What a session has cost and saved, added up from its log. Pure.

Everything is in the log already: what each snapshot stored, how long the machine stood still, what compressing took, when the
machine was put away and brought back. It must know nothing of machines or stores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recess.contextlog.contract import Entry

AWAY_WHYS = ("idle", "wait", "suspend")  # of entries that are older than the word "away" in them


@dataclass(frozen=True)
class Cost:
    """Sums over a session's own life (a fork's begins with the fork). Bytes, seconds.

    `stored_bytes`: added by snapshots that are still stored; `written_bytes`: by all there were; `read_bytes`: fetched to
    bring the machine back. `cpu_s`: processor time of comparing and compressing. `up_s`: a machine was held; `away_s`: none was,
    though the session could go on at any moment: what freezing has saved. `replies`, `input_tokens`, `output_tokens`: the model's.
    """

    snapshots: int = 0
    stored_bytes: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    cpu_s: float = 0.0
    standstill_s: float = 0.0
    thaws: int = 0
    thaw_s: float = 0.0
    up_s: float = 0.0
    away_s: float = 0.0
    turns: int = 0
    replies: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def machine_hours_saved(self) -> float:
        """Hours in which no machine was held."""
        return self.away_s / 3600


def cost_of(
    session: str, entries: Iterable[Entry], stored: Collection[str], now: float, *, closed: bool = False
) -> Cost:
    """Return the cost up to `now` (wall seconds). `stored`: the snapshots that are still there. A closed session's
    time ends with its last entry."""
    sums: dict[str, float] = {}
    up_since = away_since = last = 0.0

    def add(name: str, value: object) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            sums[name] = sums.get(name, 0) + value

    for entry in entries:
        if entry.session != session:
            continue  # of the log that this one is a fork of
        body, last = entry.body, entry.ts
        match entry.kind:
            case "machine.snapshot":
                _add_snapshot(add, body, here=str(body.get("snapshot", "")) in stored)
                if _is_away(body):
                    add("up_s", entry.ts - up_since if up_since else 0)
                    up_since, away_since = 0.0, entry.ts
            case "machine.restore":
                add("thaws", 1)
                add("thaw_s", body.get("seconds"))
                add("read_bytes", body.get("bytes_read"))
                add("away_s", entry.ts - away_since if away_since else 0)
                up_since, away_since = up_since or entry.ts, 0.0
            case "machine.lost":
                add("up_s", entry.ts - up_since if up_since else 0)
                up_since = 0.0
            case "turn.end":
                add("turns", 1)
            case "tool.start":
                add("tool_calls", 1)
            case "assistant":
                add("replies", 1)
                _add_tokens(add, body.get("usage"))
    now = last if closed else now
    add("up_s", now - up_since if up_since else 0)
    add("away_s", now - away_since if away_since else 0)
    whole = ("cpu_s", "standstill_s", "thaw_s", "up_s", "away_s")
    return Cost(**{name: value if name in whole else int(value) for name, value in sums.items()})  # type: ignore[arg-type]


def _is_away(body: Mapping[str, Any]) -> bool:
    away = body.get("away")
    return away if isinstance(away, bool) else body.get("why") in AWAY_WHYS


def _add_snapshot(add: Any, body: Mapping[str, Any], *, here: bool) -> None:
    figures = body.get("figures")
    costs = figures if isinstance(figures, Mapping) else {}
    add("snapshots", 1)
    add("written_bytes", costs.get("new_bytes"))
    add("stored_bytes", costs.get("new_bytes") if here else 0)
    add("cpu_s", costs.get("cpu_s"))
    add("standstill_s", costs.get("standstill_s"))


def _add_tokens(add: Any, usage: object) -> None:
    if isinstance(usage, Mapping):
        add("input_tokens", usage.get("prompt_tokens", usage.get("input_tokens")))
        add("output_tokens", usage.get("completion_tokens", usage.get("output_tokens")))
