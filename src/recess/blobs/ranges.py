"""Joining ranges that lie near each other, for stores that pay by the request. Pure; it must know no store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GAP_BYTES = 256 << 10
"""Reading over a gap of this size costs less than a second request: ~25 ms of latency at ~10 MB/s."""

JOINED_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class Joined:
    """One range to read. `wanted`: (place in the caller's list, offset within this range, length)."""

    offset: int
    length: int
    wanted: tuple[tuple[int, int, int], ...]


def join_ranges(
    ranges: Sequence[tuple[int, int]], *, gap_bytes: int = GAP_BYTES, most_bytes: int = JOINED_BYTES_MAX
) -> list[Joined]:
    """Return what to read, ascending: ranges at most `gap_bytes` apart are one, as long as it stays under `most_bytes`.

    Overlapping, repeated and unordered ranges are fine. Each asked range is whole in exactly one answer, so one that is
    longer than `most_bytes` is read as it is.
    """
    out: list[Joined] = []
    group: list[tuple[int, int, int]] = []
    low = high = 0
    for offset, length, place in sorted((o, n, i) for i, (o, n) in enumerate(ranges)):
        end = offset + length
        if group and (offset > high + gap_bytes or max(end, high) - low > most_bytes):
            out.append(_joined(low, high, group))
            group = []
        if not group:
            low, high = offset, end
        high = max(high, end)
        group.append((place, offset, length))
    if group:
        out.append(_joined(low, high, group))
    return out


def _joined(low: int, high: int, group: Sequence[tuple[int, int, int]]) -> Joined:
    return Joined(low, high - low, tuple((place, offset - low, length) for place, offset, length in group))
