"""Counters of what the sessions of this server did since it began, for a scraper. Counting changes nothing and asks nobody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recess.contextlog.contract import Entry

Labels = tuple[tuple[str, str], ...]
LABEL_CHARS = 60
SERIES_MAX = 2000  # a tool is named by whoever deploys it: what is new beyond that counts as "other"
OTHER = "other"


@dataclass(frozen=True)
class Sample:
    """One value of a metric."""

    name: str
    labels: Labels
    value: float


class Counters:
    """An `Observer` that counts. `samples` are sums since the server began: they only rise."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, Labels], float] = defaultdict(float)

    def taken_up(self, session: str, entries: Sequence[Entry]) -> None:
        """Count a session that is taken up; what is in its log was counted where it was written."""
        self._add("recess_session_claims_total", 1)

    def saw(self, session: str, entry: Entry) -> None:
        """Count an entry."""
        body = entry.body
        self._add("recess_log_entries_total", 1, kind=entry.kind if not entry.kind.startswith("x.") else "x")
        match entry.kind:
            case "turn.end":
                self._add("recess_turns_total", 1, status=str(body.get("status", "done")))
            case "turn.cut":
                self._add("recess_turn_cuts_total", 1, cause=str(body.get("cause", "")))
            case "tool.start":
                self._add("recess_tool_calls_total", 1, tool=str(body.get("name", "")))
            case "machine.snapshot":
                self._snapshot(body)
            case "machine.restore":
                rung = str(body.get("rung", ""))
                self._add("recess_thaws_total", 1, rung=rung)
                self._number("recess_thaw_seconds_total", body.get("seconds"), rung=rung)
                self._number("recess_thaw_read_bytes_total", body.get("bytes_read"))
            case "machine.lost":
                self._add("recess_machines_lost_total", 1)

    def _snapshot(self, body: Mapping[str, object]) -> None:
        figures = body.get("figures")
        costs = figures if isinstance(figures, Mapping) else {}
        self._add("recess_session_snapshots_total", 1, away="yes" if body.get("away") is True else "no")
        self._number("recess_snapshot_stored_bytes_total", costs.get("new_bytes"))
        self._number("recess_snapshot_standstill_seconds_total", costs.get("standstill_s"))
        self._number("recess_snapshot_cpu_seconds_total", costs.get("cpu_s"))

    def samples(self) -> list[Sample]:
        """Return all sums, by name and labels."""
        return [Sample(name, labels, value) for (name, labels), value in sorted(self._sums.items())]

    def _number(self, name: str, value: object, **labels: str) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._add(name, value, **labels)

    def _add(self, name: str, value: float, **labels: str) -> None:
        key = (name, tuple((label, text[:LABEL_CHARS]) for label, text in sorted(labels.items())))
        if key not in self._sums and len(self._sums) >= SERIES_MAX:
            key = (name, tuple((label, OTHER) for label, _ in key[1]))
        self._sums[key] += value
