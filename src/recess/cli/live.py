"""The progress of a call, as a terminal shows it: one line that is redrawn in place, with how long it takes, and a bar where it
says how much of how much. Off a terminal each line is printed once, and lines that only count bytes are not.

It must know nothing of what is being done: a line that counts is told by its form, "…: 3 of 8" or "…: 1.2 MB of 40.0 MB".
"""

from __future__ import annotations

import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import TextIO

from recess.units import format_duration

REDRAW_S = 0.1  # at most so often, however many lines come
TICK_S = 1.0
BAR_CELLS = 24
_SCALE = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_NUMBER = r"(\d+(?:\.\d+)?)(?: ?(B|kB|MB|GB))?"
_COUNTED = re.compile(rf"(.*?):? *{_NUMBER} of {_NUMBER}\Z")


def counted(text: str) -> tuple[str, float, bool] | None:
    """Return (what it is about, the share that is done, whether bytes are counted) of a line that counts, else None. Pure."""
    found = _COUNTED.fullmatch(text)
    if found is None:
        return None
    what, done, done_unit, total, total_unit = found.groups()
    whole = float(total) * _SCALE[total_unit or "B"]
    share = float(done) * _SCALE[done_unit or "B"] / whole if whole else 1.0
    return what, min(1.0, share), bool(total_unit)


def drawn(text: str, seconds: float, columns: int) -> str:
    """Return the line as it is shown: at most one row of so many columns, never a control character. Pure."""
    plain = "".join(c for c in text if not unicodedata.category(c).startswith("C"))
    took = f"  {format_duration(round(seconds))}" if seconds >= TICK_S else ""
    count = counted(plain)
    bar = ""
    if count is not None and columns > 2 * BAR_CELLS + 10:
        full = round(count[1] * BAR_CELLS)
        bar = f"  [{'#' * full}{'.' * (BAR_CELLS - full)}]"
    room = max(8, columns - 1 - len(bar) - len(took))
    return ((plain if len(plain) <= room else plain[: room - 1] + "…") + bar + took)[: columns - 1]


def columns_of(out: TextIO) -> int:
    """Return how wide a terminal is now, 80 if it does not say."""
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class LiveLine:
    """The line. `show` and `end` are called by one thread; another one redraws it every second."""

    def __init__(
        self, out: TextIO, *, columns: Callable[[], int] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out
        self._columns = columns or (lambda: columns_of(out))
        self._clock = clock
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ticker: threading.Thread | None = None
        self._text = ""
        self._since = 0.0
        self._drawn_at = -1.0

    def show(self, text: str) -> None:
        """Take the next line: it replaces one that counted the same, and stands below any other."""
        with self._lock:
            before, now = counted(self._text), counted(text)
            same = before is not None and now is not None and before[0] == now[0]
            if self._text and not same:
                self._draw()
                self._out.write("\n")
            if not same:
                self._since, self._drawn_at = self._clock(), -1.0
            self._text = text
            if self._clock() - self._drawn_at >= REDRAW_S or self._drawn_at < 0:
                self._draw()
        if self._ticker is None:
            self._over.clear()
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()

    def end(self) -> None:
        """Leave the newest line as it is: whatever is printed next stands below it. May be called twice."""
        if self._ticker is not None:
            self._over.set()
            self._ticker.join()
            self._ticker = None
        with self._lock:
            if self._text:
                self._draw()
                self._out.write("\n")
                self._out.flush()
            self._text = ""

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            with self._lock:
                if self._text:
                    self._draw()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        self._out.write("\r" + drawn(self._text, self._drawn_at - self._since, self._columns()) + "\x1b[K")
        self._out.flush()
