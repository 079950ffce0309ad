"""Coalesce the text of a streaming reply into at most 20 messages a second, and fill in what a cut stream swallowed.

The pieces are kept until the whole reply is in the log: when the connection is back, the host says how much of the reply
it has, and gets the rest. It knows one function to post with.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any

DELTA_S = 0.05
DELTA_CHARS = 1024


class DeltaPump:
    """The pieces of one reply, numbered from 0."""

    def __init__(self, post: Callable[[dict[str, Any]], None], turn: int, part: int) -> None:
        self._post, self._turn, self.part = post, turn, part
        self._pieces: list[str] = []
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
            self._pieces.append(text)
            self._send(len(self._pieces) - 1)

    def _send(self, n: int) -> None:
        self._post({"t": "delta", "turn": self._turn, "part": self.part, "n": n, "text": self._pieces[n]})

    def go_on(self, count: int, mark: int) -> None:
        """The connection is back; the host has the pieces before `count`, with this checksum of their text: send the
        others. If that is another text (the reply began afresh meanwhile), all of them: piece 0 replaces it."""
        text = "".join(self._pieces[:count]).encode("utf-8", "replace")  # as the wire writes it
        same = count <= len(self._pieces) and zlib.crc32(text) == mark
        for n in range(count if same else 0, len(self._pieces)):
            self._send(n)

    def restart(self) -> None:
        """Begin afresh: the next piece is number 0 again and replaces what was sent."""
        self.close()
        self._held, self._pieces = [], []

    def close(self) -> None:
        """Post no more: the whole reply's entry replaces what is held."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
