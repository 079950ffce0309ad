"""What one turn may use before it is taken for a runaway: time at work, steps, bytes. Pure.

Steps and bytes are counted from the log, so they go on where a crash left them; the time is a stopwatch of the supervisor
that stands still while the turn only waits (for a human, a time, a child). It must know nothing of how a turn is stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recess.errors import BadInput
from recess.sessions.facts import TurnFacts
from recess.units import GIB, format_bytes, format_duration, parse_duration, parse_size

GRACE_BYTES = 16 << 20  # what a turn that is being stopped may still say; then its process is heard no more
_KEYS = ("wall", "steps", "output", "blob", "blobs")


@dataclass(frozen=True)
class Limits:
    """The most of one turn. `wall_s`: seconds at work, all attempts together (None: no limit). `steps`: model replies and
    tool calls. `output_bytes`: what the agent says and its tools return. Of a session: `blob_bytes` one blob, `blobs_bytes`
    all that it put itself; these are refused, and stop no turn."""

    wall_s: float | None = None
    steps: int = 10_000
    output_bytes: int = GIB
    blob_bytes: int = GIB
    blobs_bytes: int = 8 * GIB


def parse_limits(value: object) -> Limits:
    """Return the limits of `@agent(limits={"wall": "30m", "steps": 200, "output": "64M"})`. Raises BadInput."""
    if value in (None, {}):
        return Limits()
    if not isinstance(value, Mapping) or not set(value) <= set(_KEYS):
        raise BadInput(f"agent config: limits must be an object with {', '.join(_KEYS)}, not {value!r}")
    default = Limits()
    steps = value.get("steps", default.steps)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise BadInput(f"agent config: limits: steps must be a number from 1, not {steps!r}")
    output = parse_size(value["output"]) if value.get("output") else default.output_bytes
    blob = parse_size(value["blob"]) if value.get("blob") else default.blob_bytes
    blobs = parse_size(value["blobs"]) if value.get("blobs") else default.blobs_bytes
    wall_s = parse_duration(value["wall"]) if value.get("wall") else default.wall_s
    if min(output, blob, blobs) < 1 or (wall_s is not None and wall_s <= 0):
        raise BadInput("agent config: limits must be more than nothing")
    return Limits(wall_s, steps, output, blob, blobs)


def excess(limits: Limits, facts: TurnFacts, *, worked_s: float, streamed_bytes: int) -> str:
    """Return which limit the open turn is over, in words for a human and the model; "" for none. `streamed_bytes`: of
    replies that have no entry yet."""
    if not facts.open:
        return ""
    if limits.wall_s is not None and worked_s >= limits.wall_s:
        return f"a runaway turn: at work for more than {format_duration(limits.wall_s)} (limits: wall)"
    if facts.steps > limits.steps:
        return f"a runaway turn: more than {limits.steps} steps (limits: steps)"
    if facts.output_bytes + streamed_bytes > limits.output_bytes:
        return f"a runaway turn: more than {format_bytes(limits.output_bytes)} of output (limits: output)"
    return ""


@dataclass(frozen=True)
class Stopwatch:
    """How long a turn was at work. `tick` is told what is the case now; what was the case since the last tick counts."""

    turn: int = 0
    seconds: float = 0.0
    at_work: bool = False
    since_s: float = 0.0

    def tick(self, now_s: float, *, turn: int, at_work: bool) -> Stopwatch:
        """Return the stopwatch at `now_s` of the monotonic clock. Another turn begins at nothing."""
        seconds = self.seconds + (now_s - self.since_s if self.at_work else 0.0)
        return Stopwatch(turn, seconds if turn == self.turn else 0.0, at_work, now_s)

    def saved(self) -> list[Any]:
        """Return what a row's meta keeps of it while the session is put away in its turn."""
        return [self.turn, round(self.seconds, 3)]


def stopwatch_of(saved: object, now_s: float) -> Stopwatch:
    """Return the stopwatch that `saved` describes; anything else is one that begins."""
    match saved:
        case [int(turn), int() | float() as seconds]:
            return Stopwatch(turn, float(seconds), False, now_s)
    return Stopwatch(since_s=now_s)
