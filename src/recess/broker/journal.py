"""What was allowed and denied, a bounded ring for each machine. Never a secret, a query string, a header or a body."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

RING_ENTRIES = 500


@dataclass(frozen=True)
class Decision:
    """One judged call. `verb`: connect | http | route | bad. `wall_s`: Unix seconds. `reason`: the rule, or why not."""

    wall_s: float
    verb: str
    host: str
    port: int
    method: str
    route: str
    allowed: bool
    reason: str


class Journal:
    """The newest decisions of one machine; `allowed` and `denied` count all, also those the ring has dropped."""

    def __init__(self, limit: int = RING_ENTRIES) -> None:
        self._ring: deque[Decision] = deque(maxlen=limit)
        self.allowed = 0
        self.denied = 0

    def add(self, decision: Decision) -> None:
        """Keep a decision, dropping the oldest over the limit."""
        self._ring.append(decision)
        if decision.allowed:
            self.allowed += 1
        else:
            self.denied += 1

    def entries(self) -> list[Decision]:
        """Return the kept decisions, oldest first."""
        return list(self._ring)
