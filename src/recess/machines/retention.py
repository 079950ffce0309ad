"""Which snapshots are kept, for how long, and which go first when space is short. Pure decisions over plain data.

What Recess takes by itself (AUTOMATIC) is Recess's to tidy up; what a user asked for stays until the user says
otherwise: by `rm`, by a time to live, by `prune --all`. Of automatic ones stay, in this order:

    needed      what a machine or a session would come back from now; never pruned
    named       only an explicit time to live ends it
    newest      the `keep_last` newest of each session, or machine without one, as long as that exists
    recent      everything younger than `retention_s`: what `session fork --at` and `rewind` may want

Under pressure (a quota or the disk's reserve) "recent" no longer protects, the oldest go first; a fork at a position
whose snapshot is gone starts from the next older one, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from recess.snapshots.recompression import Recompression
from recess.units import MIB, format_bytes

AUTOMATIC = frozenset({"idle", "suspend", "fork", "turn", "stop"})


@dataclass(frozen=True)
class Keeping:
    """The policy of a node. Seconds and bytes; 0 switches quota, reserve or the sample check off."""

    keep_last: int = 3
    retention_s: float = 24 * 3600.0
    quota_bytes: int = 0
    reserve_bytes: int = 256 * MIB
    check_every_s: float = 24 * 3600.0
    recompression: Recompression = field(default_factory=Recompression)


@dataclass(frozen=True)
class Holds:
    """Snapshots that the room above needs, with what for. `current`: the state of something that sleeps or runs;
    `logged`: a place that somebody may want to go back to. `closed`: sessions that will never run again."""

    current: Mapping[str, str] = field(default_factory=dict)
    logged: Mapping[str, str] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """One snapshot as the policy sees it. `series`: the session, or the machine, it is one of many of."""

    id: str
    series: str
    created: float
    automatic: bool
    named: bool
    needed: bool
    wanted: bool  # the log names it, within the retention
    series_alive: bool
    expires: float = 0.0


@dataclass(frozen=True)
class Doomed:
    """A snapshot to be pruned, and why."""

    id: str
    why: str


def prunable(
    candidates: Iterable[Candidate], *, now: float, keeping: Keeping, everything: bool = False, pressed: bool = False
) -> list[Doomed]:
    """Return what may go, oldest first. `everything`: unnamed ones that a user took count as automatic too."""
    rank: dict[str, int] = {}
    doomed: list[tuple[float, Doomed]] = []
    for one in sorted(candidates, key=lambda c: (c.created, c.id), reverse=True):
        counted = (one.automatic or everything) and not one.named
        place = rank.get(one.series, 0) if counted else 0
        if counted:
            rank[one.series] = place + 1
        why = _why_prune(one, place, counted, now, keeping, pressed)
        if why:
            doomed.append((one.created, Doomed(one.id, why)))
    return [found for _, found in reversed(doomed)]


def _why_prune(one: Candidate, place: int, counted: bool, now: float, keeping: Keeping, pressed: bool) -> str:
    if one.needed:
        return ""
    if one.expires and one.expires <= now:
        return "its time to live is over"
    if not counted or (one.series_alive and place < keeping.keep_last):
        return ""
    recent = one.wanted or now - one.created < keeping.retention_s
    if recent:
        return "space is short" if pressed else ""
    return f"older than the retention, and not among the {keeping.keep_last} newest" if one.series_alive else (
        "older than the retention, and its machine or session is gone"
    )  # fmt: skip


def beyond_last(candidates: Iterable[Candidate], series: str, keep_last: int) -> list[Doomed]:
    """Return the unnamed, unneeded snapshots of a series beyond its newest `keep_last`, oldest first, whoever took them."""
    own = sorted((c for c in candidates if c.series == series and not c.named), key=lambda c: (c.created, c.id))
    older = own[: max(0, len(own) - keep_last)]
    return [Doomed(one.id, f"not among the {keep_last} newest") for one in older if not one.needed]


def missing_bytes(keeping: Keeping, *, used: int, free: int | None) -> int:
    """Return how many bytes must be given back before anything more may be stored; 0: there is room.

    `used`: bytes of the store; `free`: of its disk for this user, None where nobody can tell.
    """
    over = used - keeping.quota_bytes if keeping.quota_bytes else 0
    short = keeping.reserve_bytes - free if free is not None and keeping.reserve_bytes else 0
    return max(0, over, short)


def no_room(keeping: Keeping, *, used: int, free: int | None) -> str:
    """Return why nothing more is stored, in one line."""
    if keeping.quota_bytes and used > keeping.quota_bytes:
        return f"snapshots hold {format_bytes(used)}, over their quota of {format_bytes(keeping.quota_bytes)}"
    return f"the disk has {format_bytes(free or 0)} left, {format_bytes(keeping.reserve_bytes)} are kept in reserve"
