"""Which part of a kept output somebody asked for, as Docker's `logs` has it: by time, by the last lines, each with its time.

Pure. A line has the time of its first byte; one of which nobody knows when it came is older than all others. Lines end at
a line feed only: what a progress bar redraws stays one line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from recess.machines.outputlog import Piece, Said
from recess.units import format_moment


@dataclass(frozen=True)
class Wanted:
    """`since_ns`, `until_ns`: wall times, both inclusive. `tail`: so many of the last lines. None: no bound. `timestamps`: each
    line begins with its time."""

    since_ns: int | None = None
    until_ns: int | None = None
    tail: int | None = None
    timestamps: bool = False

    @property
    def needs_times(self) -> bool:
        """Tell whether it matters when a line came."""
        return self.timestamps or self.since_ns is not None or self.until_ns is not None


def select(said: Said, wanted: Wanted) -> Said:
    """Return what is wanted of an output; its totals stay those of the whole."""
    if wanted == Wanted():
        return said
    lines = [line for line in _lines(said.pieces) if _within(line, wanted)]
    if wanted.tail is not None:
        lines = lines[max(0, len(lines) - wanted.tail) :]
    if wanted.timestamps:
        lines = [line._replace(data=f"{format_moment(line.at_ns)} ".encode() + line.data) for line in lines]
    return replace(said, pieces=lines)


def _within(line: Piece, wanted: Wanted) -> bool:
    after = wanted.since_ns is None or line.at_ns >= wanted.since_ns
    return after and (wanted.until_ns is None or line.at_ns <= wanted.until_ns)


def _lines(pieces: Iterable[Piece]) -> list[Piece]:
    """Whole lines, in the order of their beginnings; the last of each stream may be unfinished."""
    lines: list[tuple[int, int, list[bytes]]] = []
    unfinished: dict[int, list[bytes]] = {}  # by stream
    for stream, data, at_ns in pieces:
        for part in _at_line_feeds(data):
            parts = unfinished.pop(stream, None)
            if parts is None:
                parts = []
                lines.append((stream, at_ns, parts))
            parts.append(part)
            if not part.endswith(b"\n"):
                unfinished[stream] = parts
    return [Piece(stream, b"".join(parts), at_ns) for stream, at_ns, parts in lines]


def _at_line_feeds(data: bytes) -> list[bytes]:
    parts = [part + b"\n" for part in data.split(b"\n")]
    parts[-1] = parts[-1][:-1]
    return [part for part in parts if part]
