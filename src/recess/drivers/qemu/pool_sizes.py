"""How many VMs to keep started for the next restore: a pure decision over what is known.

A VM that waits costs memory and saves its taker the start of a process, so the size follows demand: as many as the
largest burst of late, less and less of it as it grows old, and at least one as long as anybody has asked within
`KEEP_S`; then none. All kinds together stay below a number and below a share of the memory that is free.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

KEEP_S = 600.0
"""A kind that nobody asked for that long has none waiting."""

BURST_S = 0.5
"""Starts within this time of each other want a VM each: nothing can be started for the second meanwhile."""

HALF_S = 120.0
"""A burst counts half after this time, a quarter after twice of it."""

MEMORY_SHARE = 0.1
"""Of the host's free memory, what those that wait have already included."""

STARTS_MAX = 64
"""Times of starts that are remembered of a kind: more than any pool is large."""


@dataclass(frozen=True)
class Facts(Generic[K]):
    """What the decision is made of. `starts`: when each kind was asked for, ascending, seconds on the clock of `now_s`;
    `free_bytes`: what the host has, plus what those that wait hold; `each_bytes`: what one costs."""

    now_s: float
    starts: Mapping[K, Sequence[float]]
    limit: int
    free_bytes: int
    each_bytes: int


def wanted(facts: Facts[K]) -> dict[K, int]:
    """Return how many of each kind should wait; kinds with none are left out."""
    room = min(facts.limit, int(facts.free_bytes * MEMORY_SHARE) // max(1, facts.each_bytes))
    needs = {kind: burst(starts, facts.now_s) for kind, starts in facts.starts.items()}
    order = sorted((kind for kind, need in needs.items() if need), key=lambda kind: -facts.starts[kind][-1])
    out: dict[K, int] = {}
    while room > 0:
        # One for each before a second for any: the first saves a start that is likely, the last one that may not come.
        served = [kind for kind in order if out.get(kind, 0) < needs[kind]][:room]
        if not served:
            break
        for kind in served:
            out[kind] = out.get(kind, 0) + 1
        room -= len(served)
    return out


def burst(starts: Sequence[float], now_s: float) -> int:
    """Return the size of the largest burst of these starts, by its age; 0 if nobody has asked for long."""
    recent = [at for at in starts if now_s - at < KEEP_S]
    if not recent:
        return 0
    sizes = [
        (bisect.bisect_right(recent, at + BURST_S) - first) * math.exp2((at - now_s) / HALF_S)
        for first, at in enumerate(recent)
    ]
    return max(1, round(max(sizes)))
