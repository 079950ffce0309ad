"""Coalesce the text of a streaming reply into at most 20 messages a second. It knows one function to post with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

DELTA_S = 0.05
DELTA_CHARS = 1024


class DeltaPump:
    """The pieces of one reply, numbered from 0."""

    def __init__(self, post: Callable[[dict[str, Any]], None], turn: int, part: int) -> None:
        self._post, self._turn, self._part = post, turn, part
        self._n = 0
        self._held: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, text: str) -> None:
        """Take more text."""
        if not text:
            return
        self._held.append(text)
        if sum(map(len, self._held)) >= DELTA_CHARS:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELTA_S, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        text, self._held = "".join(self._held), []
        if text:
            self._post({"t": "delta", "turn": self._turn, "part": self._part, "n": self._n, "text": text})
            self._n += 1

    def restart(self) -> None:
        """Begin afresh: the next piece is number 0 again and replaces what was sent."""
        self.close()
        self._held, self._n = [], 0

    def close(self) -> None:
        """Post no more: the whole reply's entry replaces what is held."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
