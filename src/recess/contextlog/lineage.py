"""Which session's rows make up a log: flat ranges, so that reading a fork of a fork of a fork is not recursive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class Range:
    """Positions `first` to `last` (both included) are rows of session `owner`."""

    owner: str
    first: int
    last: int


def ranges_of(session: str, inherited: Sequence[Range], fork_position: int, head: int) -> list[Range]:
    """Return all ranges of a session in order: what it inherited, then its own rows."""
    own = [Range(session, fork_position + 1, head)] if head > fork_position else []
    return [*inherited, *own]


def clip(ranges: Iterable[Range], after: int, to: int) -> list[Range]:
    """Return the parts of the ranges with after < position <= to, empty ones left out."""
    cut = (Range(r.owner, max(r.first, after + 1), min(r.last, to)) for r in ranges)
    return [r for r in cut if r.first <= r.last]


def encode(ranges: Iterable[Range]) -> str:
    """Return JSON text: [[owner, first, last], ...]."""
    return msgspec.json.encode([(r.owner, r.first, r.last) for r in ranges]).decode()


def decode(text: str) -> list[Range]:
    """Return the ranges of JSON text. Raises msgspec.MsgspecError."""
    return [Range(*item) for item in msgspec.json.decode(text, type=list[tuple[str, int, int]])]
