"""Which old files a new snapshot stops referring to: their live content goes into its own file instead.

Without this a session's hundredth snapshot would refer to a hundred layers, each mostly dead: restores slow down and
nothing can be collected. Rewriting costs bytes now, so it is done only when at least half of a file is dead weight, or
when there are too many files to open at restore; then the smallest go first. Each page is thus rewritten O(log n)
times over n snapshots, and the files a snapshot refers to hold at most twice what it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIVE_FRACTION_MIN = 0.5
PAGES_PER_FRAME_MIN = 8  # half of a frame of the default size
FILES_MAX = 8  # the new one included; opening one takes about 0.3 ms


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


def files_to_rewrite(
    usages: Sequence[Usage], *, live_fraction_min: float = LIVE_FRACTION_MIN, files_max: int = FILES_MAX
) -> set[str]:
    """Return the ids of the files whose live entries should be written anew."""
    sparse = {usage.id for usage in usages if usage.live < live_fraction_min * usage.entries}
    rest = sorted((usage for usage in usages if usage.id not in sparse), key=lambda usage: (usage.live, usage.id))
    surplus = max(0, len(rest) + 1 - files_max)
    return sparse | {usage.id for usage in rest[:surplus]}
