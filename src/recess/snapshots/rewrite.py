"""Which old files are not referred to any more: their live content goes into a file of its own, or into a snapshot's.

Without this a session's hundredth snapshot would refer to a hundred layers, each mostly dead: restores slow down and
nothing can be collected. It is done when at least half of a file is dead weight, or when there are too many files to open at
restore.

*Joining* (`joins`), for layers, is beside the snapshots (`joining`), so what a move costs in bytes decides alone: of too
many layers the smaller half goes at once, and with it those that are no more than half of what goes. Simulated, 240
snapshots of random pages of a disk of 1.5 GiB: of 0.25, 1, 4 and 10 MiB each they write 3.5, 3.4, 3.1 and 3.2 times what is new
(by what follows below 2.7, 3.2, 4.6 and 4.7, and up to 61 times what is new in one snapshot).

*Rewriting* (`rewrites`) is a part of writing a snapshot: of page maps, of layers for a process that did not write the parent
(each snapshot may have one of its own, that ends before it could join), and of what gathers faster than it is joined. Never
more at once than a budget of a few times what is new: a large layer is emptied a piece at a time, over several snapshots. Of too many files the smallest go, and with them
all of about their size, as in a log-structured merge tree of size tiers: together they make a larger one, and the next
snapshots rewrite nothing. (Were only as many rewritten as are too many, each snapshot would do it again: 240 snapshots of
0.25 MiB of random pages of a disk of 1.5 GiB, simulated, wrote 17.4 times what was new, and in tiers 2.7; of 1 MiB 9.0 and 3.2;
of 4 and 10 MiB, which the budget rules, 4.9 and 4.1, and 4.6 and 4.1.) Each page is thus rewritten O(log n) times over n snapshots, and the files a snapshot refers
to hold at most twice what it uses, and what a budget had no room for yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LIVE_FRACTION_MIN = 0.5
PAGES_PER_FRAME_MIN = 8  # half of a frame of the default size
FILES_MAX = 16  # the new one included; opening one takes about 0.3 ms
FILES_HARD_MAX = 24  # beyond it the smallest go whatever they cost: no more than a 23rd of what is live, each
LIVE_FRACTION_LATE = 0.25  # of what should have been joined by now, and was not
JOIN_PAGES_MAX = 1 << 16  # 256 MiB in one joined layer; what is left of a sparse one goes the next time
JOIN_DEAD_MIN = 256  # 1 MiB: less dead weight is not worth a file of its own
JOIN_SMALLER = 0.5
NEXT_TO_NOTHING = 64
TIER = 3  # files of up to so many times the smallest one's size go together
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


def joins(usages: Sequence[Usage], *, pages_max: int = JOIN_PAGES_MAX) -> dict[str, int]:
    """Return how many of the live entries of which of a snapshot's layers should go into a joined one: all, or of a sparse one
    as many as there is room for. Pure."""
    sparse = sorted((u for u in usages if u.live < LIVE_FRACTION_MIN * u.entries), key=_emptiest)
    moved: dict[str, int] = {}
    for usage in (u for u in sparse if u.entries - u.live >= JOIN_DEAD_MIN):
        if count := min(usage.live, pages_max - sum(moved.values())):
            moved[usage.id] = count
    rest = sorted((u for u in usages if u.id not in moved), key=lambda u: (u.live, u.id))
    too_many = len(rest) + bool(moved) >= FILES_MAX
    if not moved and not too_many:
        return {}
    small: dict[str, int] = {}
    total = sum(moved.values())
    for number, usage in enumerate(rest):
        if too_many:
            wanted = number < FILES_MAX // 2 + 1 or usage.live <= JOIN_SMALLER * total
        else:  # a file is made in any case: the smallest may come along
            wanted = sum(small.values()) + usage.live <= JOIN_DEAD_MIN
        if not wanted or total + usage.live > pages_max:
            break
        small[usage.id] = usage.live
        total += usage.live
    return moved | small if len(small) + bool(moved) > 1 else moved  # one file in the place of one is nothing won


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


def late_rewrites(usages: Sequence[Usage], before: Mapping[str, int], *, new_pages: int) -> dict[str, int]:
    """Return what a snapshot with so many new pages rewrites of what is left to `joins`: what there was no time for, and what is
    next to nothing beside its own pages and sets a whole file free (a guest writes the same pages again and again).
    `before`: the live entries of the parent's files; one that was not sparse then is joined after this snapshot. Pure."""
    budget = budget_of(new_pages)
    late = [
        u for u in usages
        if before.get(u.id, u.live) < LIVE_FRACTION_MIN * u.entries or u.live * NEXT_TO_NOTHING <= new_pages
    ]  # fmt: skip
    moved = rewrites(late, budget=budget, live_fraction_min=LIVE_FRACTION_LATE, files_max=len(usages) + 1)
    rest = [u for u in usages if u.id not in moved]
    left = budget - sum(moved.values())
    return moved | rewrites(rest, budget=left, live_fraction_min=0.0, files_max=FILES_HARD_MAX)


def _emptiest(usage: Usage) -> tuple[float, str]:
    return usage.live / usage.entries, usage.id
