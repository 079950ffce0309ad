"""The story's timeline: steps with measured figures and checks, as lines for people, as a table, as JSON.

Pure data and rendering; printing is given in. A check that does not hold ends the story (`StoryFailed`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from recess.errors import RecessError
from recess.units import format_bytes, format_duration

Figure = float | int | str
Say = Callable[[str], None]


class StoryFailed(RecessError):
    """A step of the story did not hold; the message says which, the details what was seen instead."""

    code = "story_failed"


@dataclass
class Step:
    """One step. `figures`: names end in their unit (`_s`, `_bytes`); `checks`: what was verified."""

    name: str
    title: str
    at_s: float
    seconds: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)


def show_figure(name: str, value: Figure) -> str:
    """Return "standstill 21 ms" for ("standstill_s", 0.0213)."""
    if not isinstance(value, str):
        if name.endswith("_s"):
            return f"{name.removesuffix('_s').replace('_', ' ')} {format_duration(value)}"
        if name.endswith("_bytes"):
            return f"{name.removesuffix('_bytes').replace('_', ' ')} {format_bytes(int(value))}"
    return f"{name.replace('_', ' ')} {value}"


class Report:
    """Collects steps and says each line when it is known. `started` is wall seconds."""

    def __init__(self, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._zero = clock()
        self.started = time.time()
        self.steps: list[Step] = []
        self.error = ""

    def begin(self, name: str, title: str) -> Step:
        """Open the next step; its clock runs until `end`."""
        step = Step(name, title, self._clock() - self._zero)
        self.steps.append(step)
        self._say(f"{step.at_s:7.2f} s  {title}")
        return step

    def end(self, step: Step, **figures: Figure) -> None:
        """Close a step with its figures."""
        step.seconds = self._clock() - self._zero - step.at_s
        step.figures.update(figures)
        shown = ", ".join(show_figure(name, value) for name, value in step.figures.items())
        self._say(f"{'':11}took {format_duration(step.seconds)}{'; ' if shown else ''}{shown}")

    def tell(self, text: str) -> None:
        """Say a line of the story itself: what somebody said, what was seen."""
        self._say(f"{'':11}{text}")

    def check(self, step: Step, what: str, holds: bool, seen: object = "") -> None:
        """Record that something was verified. Raises StoryFailed, naming the step and what was seen, if it is not so."""
        if not holds:
            raise StoryFailed(f"step {step.name!r}: not true: {what}", seen=str(seen)[:2000])
        step.checks.append(what)
        self._say(f"{'':11}ok  {what}")

    @property
    def seconds(self) -> float:
        """How long the story has taken so far."""
        return self._clock() - self._zero

    def table(self) -> list[str]:
        """Return the closing table: rung, standstill, durable, bytes, restore of each step that moved a machine.

        A machine that is put away is not woken, so it has no standstill: how long it took to be gone stands instead.
        """
        columns = ("rung", "standstill_s", "durable_s", "freeze_to_gone_s", "stored_bytes", "restore_s")
        heads = ("step", "rung", "standstill", "durable", "freeze to gone", "stored", "restore", "step took")
        rows: list[tuple[str, ...]] = [heads]
        for step in self.steps:
            if any(name in step.figures for name in columns):
                cells = [_cell(name, step.figures) for name in columns]
                rows.append((step.name, *cells, format_duration(step.seconds)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {
            "ok": not self.error,
            "error": self.error,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "checks": sum(len(step.checks) for step in self.steps),
            "steps": [asdict(step) for step in self.steps],
        }


def _cell(name: str, figures: Mapping[str, Figure]) -> str:
    value = figures.get(name)
    if value is None:
        return "not woken" if name == "standstill_s" and "freeze_to_gone_s" in figures else "-"
    if isinstance(value, str):
        return value
    if name.endswith("_s"):
        return format_duration(value)
    return format_bytes(int(value)) if name.endswith("_bytes") else str(value)
