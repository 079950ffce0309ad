"""Following a session: entries as they come and the pieces of replies being streamed, from any place where one stopped.

It reads the log and nothing else, so a slow reader holds nobody up and a dropped one goes on wherever the session lives
by then. A *place* says how far a reader has come; it is what an SSE id carries. This module must know nothing of HTTP.

No piece is missing or doubled by one rule: piece `n` follows piece `n - 1`, and piece 0 begins its reply afresh, replacing
what the reader has of it. Pieces that follow a gap wait until the gap is filled or the reply's entry is there. A reader who
comes back gets the pieces after its own only if the text so far is the same (`mark`), else all of them from piece 0.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from recess.contextlog.contract import ContextLog, Delta, Entry
from recess.errors import BadInput

PAGE = 500
PAGE_BYTES = 4 << 20  # of bodies: what a slow reader makes us hold
PLACE_MAX = 100


@dataclass(frozen=True)
class Piece(Delta):
    """A piece of a reply; `mark` is a checksum of the reply's text up to its end."""

    mark: int = 0


@dataclass(frozen=True)
class Place:
    """How far a reader has come: all entries up to `head` and, of the reply (turn, part), the pieces up to `n`."""

    head: int = 0
    turn: int = 0
    part: int = 0
    n: int = -1
    mark: int = 0

    def __str__(self) -> str:
        """The id of what was read last: `HEAD` after an entry, `HEAD.TURN.PART.N.MARK` after a piece."""
        return f"{self.head}" if self.n < 0 else f"{self.head}.{self.turn}.{self.part}.{self.n}.{self.mark:x}"


def parse_place(text: str) -> Place:
    """Return the place that an id names. Raises BadInput."""
    try:
        if len(text) > PLACE_MAX or not text.isascii():
            raise ValueError
        words = text.split(".")
        numbers = [int(one) for one in words[:4]]
        if min(numbers) < 0 or len(words) not in (1, 5):
            raise ValueError
        if len(words) == 1:
            return Place(numbers[0])
        head, turn, part, n = numbers
        return Place(head, turn, part, n, int(words[4], 16))
    except ValueError as exc:
        raise BadInput(f"not an event's id: {text[:PLACE_MAX]!r}", hint="give back an id as it came, or 0") from exc


def pieces_of(deltas: Iterable[Delta]) -> dict[tuple[int, int], list[Piece]]:
    """Return, of each reply (turn, part), the pieces from 0 up to the first gap, with their marks."""
    out: dict[tuple[int, int], list[Piece]] = {}
    for delta in sorted(deltas, key=lambda one: (one.turn, one.part, one.n)):
        whole = out.setdefault((delta.turn, delta.part), [])
        if delta.n == len(whole):
            mark = zlib.crc32(delta.text.encode(), whole[-1].mark if whole else 0)
            whole.append(Piece(delta.turn, delta.part, delta.n, delta.text, mark))
    return out


class Feed:
    """One reader of one session. `place` moves with what `ready` returned last."""

    def __init__(self, log: ContextLog, session: str, place: Place | None = None) -> None:
        self._log = log
        self._session = session
        self.place = place or Place()
        self.ended = False  # the session is closed, and all of it was read
        self.failure = ""  # why there is nothing new: its machine does not come up
        self._ticket = 0
        # (turn, part) -> the last piece that the reader has
        self._had: dict[tuple[int, int], tuple[int, int]] = {}
        if self.place.n >= 0:
            self._had[(self.place.turn, self.place.part)] = (self.place.n, self.place.mark)

    async def ready(self) -> list[tuple[Place, Entry | Piece]]:
        """Return what there is now and was not returned before, in order, each with the place after it; at most PAGE
        entries at once, and PAGE_BYTES of them (but one)."""
        self._ticket = self._log.ticket(self._session)
        out: list[tuple[Place, Entry | Piece]] = []
        entries = await self._log.read(self._session, after=self.place.head, limit=PAGE, max_bytes=PAGE_BYTES)
        for entry in entries:
            self.place = Place(entry.position)
            out.append((self.place, entry))
        if entries:
            return out  # pieces are read when there is no entry left: an entry may have replaced them
        fresh = pieces_of(await self._log.deltas(self._session))
        self._had = {key: had for key, had in self._had.items() if key in fresh}
        for key, pieces in fresh.items():
            for piece in pieces[self._from(key, pieces) :]:
                self._had[key] = (piece.n, piece.mark)
                self.place = Place(self.place.head, piece.turn, piece.part, piece.n, piece.mark)
                out.append((self.place, piece))
        if not out:
            row = await self._log.get(self._session)
            self.ended = row.state == "closed" and row.head <= self.place.head
            self.failure = str(row.meta.get("failure") or "") if row.state in ("cold", "frozen") else ""
        return out

    def _from(self, key: tuple[int, int], pieces: list[Piece]) -> int:
        """Return the first piece that the reader lacks: 0 if what it has is not the beginning of this reply."""
        n, mark = self._had.get(key, (-1, 0))
        return n + 1 if n < len(pieces) and (n < 0 or pieces[n].mark == mark) else 0

    async def wait(self, seconds: float) -> None:
        """Return when something may have come since `ready`, at the latest after `seconds`."""
        await self._log.wait(self._session, self.place.head, seconds, ticket=self._ticket)

    async def items(self, patience_s: float) -> AsyncIterator[tuple[Place, Entry | Piece]]:
        """Yield for ever, until the session is closed and read. `patience_s`: look again at least so often."""
        while not self.ended:
            found = await self.ready()
            for one in found:
                yield one
            if not found and not self.ended:
                await self.wait(patience_s)
