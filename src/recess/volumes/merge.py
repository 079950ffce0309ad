"""What to do about a volume: host and machine as they are now, against what both were when they last agreed. Pure.

One side changed: its change goes to the other. Both did: the newest file wins and the other is kept under a name of its
own; a file that was changed here and removed there stays. Nothing is ever taken for removed because a whole side is
empty: that is a disk that is not mounted or a folder that was lost as often as somebody's wish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recess.volumes.trees import DIR, FILE, Entry, Tree, above, same, unchanged

IN = "in"  # host -> machine
OUT = "out"  # machine -> host
SETTLE = "settle"  # both have it already
STUCK = "stuck"  # a file here, a folder there: for a human
HOST = "host"
GUEST = "guest"


@dataclass(frozen=True)
class Pair:
    """What each side had when they last agreed on a path; None: nothing."""

    host: Entry | None
    guest: Entry | None


@dataclass(frozen=True)
class Step:
    """What is to be done for one path; `host` and `guest` are as they are now. With IN and no `host` it is removed in the
    machine, with OUT and no `guest` on the host. `loser`: whose version is kept aside first. `told`: both had changed."""

    path: str
    act: str
    host: Entry | None
    guest: Entry | None
    loser: str = ""
    told: bool = False


def plan(
    before: Mapping[str, Pair] | None, host: Tree, guest: Tree, *, readonly: bool
) -> tuple[list[Step], dict[str, Pair]]:
    """Return the steps, by path, and the pairs that stay as they are. `before` None: they never agreed on anything.

    `readonly`: nothing goes out; the host's side wins where it changed, elsewhere the machine keeps what it made of it.
    """
    known = before if before is not None and _both_there(before, host, guest) else {}
    steps: list[Step] = []
    kept: dict[str, Pair] = {}
    stuck: set[str] = set()
    for path in sorted({*known, *host, *guest}):
        h, g, pair = host.get(path), guest.get(path), known.get(path)
        if any(folder in stuck for folder in above(path)):
            steps.append(Step(path, STUCK, h, g))
            continue
        step = _decide(path, h, g, pair, readonly=readonly)
        if step is None:
            if pair is not None and (h is not None or g is not None):
                kept[path] = Pair(h, g) if unchanged(h, pair.host) and unchanged(g, pair.guest) else pair
            continue
        if step.act == STUCK:
            stuck.add(path)
        steps.append(step)
    return steps, kept


def _both_there(before: Mapping[str, Pair], host: Tree, guest: Tree) -> bool:
    had_host = any(pair.host is not None for pair in before.values())
    had_guest = any(pair.guest is not None for pair in before.values())
    return bool((host or not had_host) and (guest or not had_guest))


def _decide(path: str, h: Entry | None, g: Entry | None, pair: Pair | None, *, readonly: bool) -> Step | None:
    if h is None and g is None:
        return None
    old = pair or Pair(None, None)
    host_moved, guest_moved = not unchanged(h, old.host), not unchanged(g, old.guest)
    if not host_moved and not guest_moved:
        return None
    if not guest_moved:
        return Step(path, IN, h, g)
    if not host_moved:
        return None if readonly else Step(path, OUT, h, g)
    if h is not None and g is not None and same(h, g):
        return Step(path, SETTLE, h, g)
    if readonly:
        return Step(path, IN, h, g, told=True)
    return _both_changed(path, h, g)


def _both_changed(path: str, h: Entry | None, g: Entry | None) -> Step:
    if h is None:
        return Step(path, OUT, h, g, told=True)
    if g is None:
        return Step(path, IN, h, g, told=True)
    if DIR in (h.kind, g.kind):
        return Step(path, STUCK, h, g, told=True)
    if h.kind == g.kind == FILE and g.mtime_ns > h.mtime_ns:
        return Step(path, OUT, h, g, loser=HOST, told=True)
    return Step(path, IN, h, g, loser=GUEST, told=True)
