"""Which old files a new snapshot stops referring to: their live content goes into its own file instead.

Without this a session's hundredth snapshot would refer to a hundred layers, each mostly dead: restores slow down and
nothing can be collected. Rewriting costs bytes and time now, so it is done only when at least half of a file is dead
weight, or when there are too many files to open at restore, and never more at once than a budget of a few times what is
new: a large layer is emptied a piece at a time, over several snapshots. Of too many files the smallest go, and with them
all of about their size, as in a log-structured merge tree of size tiers: together they make a larger one, and the next
snapshots rewrite nothing. (Were only as many rewritten as are too many, each snapshot would do it again: 240 snapshots of
0.25 MiB of random pages of a disk of 1.5 GiB, simulated, wrote 17.4 times what was new, and in tiers 2.7; of 1 MiB 9.0 and 3.2;
of 4 and 10 MiB, which the budget rules, 4.9 and 4.1, and 4.6 and 4.1.) Each page is thus rewritten O(log n) times over n snapshots, and the files a snapshot refers
to hold at most twice what it uses, and what a budget had no room for yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIVE_FRACTION_MIN = 0.5
PAGES_PER_FRAME_MIN = 8  # half of a frame of the default size
FILES_MAX = 16  # the new one included; opening one takes about 0.3 ms
TIER = 3  # files of up to so many times the smallest one's size go together
FILES_HARD_MAX = 24  # beyond it the smallest go whatever they cost: no more than a 23rd of what is live, each
BUDGET_PAGES_MIN = 4096  # 16 MiB: some 50 ms of two cores
BUDGET_PER_NEW = 2


def worth_comparing(pages: int, frames: int, *, inherits: bool) -> bool:
    """Decide whether captured pages are compared with the parent's, for which `frames` must be decoded.

    Without exact tracking most captured pages are the parent's: always. With it most were written indeed, and the few
    that were given the same bytes again (measured: 5 %) are not worth decoding a frame for each scattered page.
    """
    return not inherits or pages >= frames * PAGES_PER_FRAME_MIN


@dataclass(frozen=True)
class Usage:
    """How much of an old file the new snapshot would still use: `live` of `entries` slots or nodes."""

    id: str
    live: int
    entries: int


def budget_of(new_pages: int) -> int:
    """Return how many old pages a snapshot with this many new ones may write anew."""
    return max(BUDGET_PAGES_MIN, BUDGET_PER_NEW * new_pages)


def rewrites(
    usages: Sequence[Usage],
    *,
    budget: int,
    live_fraction_min: float = LIVE_FRACTION_MIN,
    files_max: int = FILES_MAX,
    files_hard_max: int = FILES_HARD_MAX,
) -> dict[str, int]:
    """Return how many of the live entries of which files should be written anew: all of them, or as many as the budget
    allows of the one that does not fit it any more. Sparse files go first, the emptiest of them first; then, if there are too
    many, the smallest with all of their tier. Pure."""
    sparse = sorted((u for u in usages if u.live < live_fraction_min * u.entries), key=_emptiest)
    moved: dict[str, int] = {}
    for usage in sparse:
        count = min(usage.live, budget)
        if count:
            moved[usage.id] = count
            budget -= count
    rest = sorted((u for u in usages if u.id not in moved), key=lambda u: (u.live, u.id))
    left = sum(moved.get(u.id, 0) < u.live for u in usages) + 1
    too_many, tier = left > files_max, TIER * (rest[0].live if rest else 0)
    for usage in rest:
        if (
            not too_many
            or (left <= files_max and usage.live > tier)
            or (usage.live > budget and left <= files_hard_max)
        ):
            break
        moved[usage.id] = usage.live
        budget = max(0, budget - usage.live)
        left -= 1
    return moved


def _emptiest(usage: Usage) -> tuple[float, str]:
    return usage.live / usage.entries, usage.id
