"""Times of the form `minute hour day month weekday`, in UTC: when is the next one, which was the last? Pure.

A field is `*`, a number, a range `a-b`, a list of these, each with an optional step `/n`; weekdays are 0 (Sunday) to 6, 7 is Sunday
too. As in cron(8): where both day and weekday are given, either is enough. It must know nothing of sessions or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from recess.errors import BadInput

FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
TEXT_MAX = 200
DAYS_AHEAD = 8 * 366 + 1  # the longest gap: 29 February over a year that ends a century


@dataclass(frozen=True)
class Cron:
    """A checked expression: the numbers that each field allows."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0: Sunday
    either_day: bool  # both day and weekday are given

    def next_after(self, now: float) -> float | None:
        """Return the first time after `now` (wall seconds), None if there never is one (30 February)."""
        return self._search(now, 1)

    def last_until(self, now: float) -> float | None:
        """Return the newest time that is not after `now`, None if there never was one."""
        return self._search(now, -1)

    def _search(self, now: float, way: int) -> float | None:
        minute = datetime.fromtimestamp(now // 60 * 60, UTC)
        if way > 0:
            minute += timedelta(minutes=1)
        day = minute.replace(hour=0, minute=0)
        for n in range(DAYS_AHEAD):
            here = day + timedelta(days=way * n)
            if not self._on(here):
                continue
            times = [here.replace(hour=h, minute=m) for h in self.hours for m in self.minutes]
            fitting = [one for one in times if n or (one >= minute if way > 0 else one <= minute)]
            if fitting:
                return (min(fitting) if way > 0 else max(fitting)).timestamp()
        return None

    def _on(self, day: datetime) -> bool:
        by_day, by_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (by_day or by_weekday if self.either_day else by_day and by_weekday)


def parse_cron(text: str) -> Cron:
    """Return the expression. Raises BadInput naming the field that is wrong."""
    words = text.split() if len(text) <= TEXT_MAX else []
    if len(words) != len(FIELDS):
        raise BadInput(f"cron: {text[:TEXT_MAX]!r} has not five fields", hint="minute hour day month weekday, in UTC")
    minutes, hours, days, months, weekdays = (
        _field(word, name, low, high) for word, (name, low, high) in zip(words, FIELDS, strict=True)
    )
    given = not words[2].startswith("*") and not words[4].startswith("*")
    return Cron(minutes, hours, days, months, frozenset(one % 7 for one in weekdays), given)


def _field(word: str, name: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        try:
            if span == "*":
                start, end = low, high if name != "weekday" else 6
            else:
                start = _number(first)
                end = _number(last) if dash else high if slash else start
            every = _number(step) if slash else 1
        except ValueError as exc:
            raise BadInput(f"cron: {name}: not a number, range or *: {part!r}") from exc
        if not low <= start <= end <= high or every < 1:
            raise BadInput(f"cron: {name}: {part!r} is not within {low} to {high}")
        found.update(range(start, end + 1, every))
    return frozenset(found)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)
