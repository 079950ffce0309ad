"""What a tree of files is made of, on either side of a volume: plain entries by path, and when two of them are the same.

A path is relative, with "/" between names; "" is the one file of a volume that is a file. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

FILE = "file"
DIR = "dir"
LINK = "link"

ENTRIES_MAX = 50_000
"""Of one volume, on each side."""

NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 2048
SECOND_NS = 1_000_000_000
_TIME_MAX_NS = 1 << 62


@dataclass(frozen=True)
class Entry:
    """One file, folder or link. `mode` are permission bits; of them only "may be run" tells two entries apart."""

    kind: str
    size: int = 0
    mtime_ns: int = 0
    mode: int = 0o644
    target: str = ""  # of a link

    @property
    def runs(self) -> bool:
        """Whether its owner may run it."""
        return bool(self.mode & 0o100)


Tree = Mapping[str, Entry]


def unchanged(now: Entry | None, before: Entry | None) -> bool:
    """Tell whether one side's entry is what it was there when it was last looked at."""
    if now is None or before is None:
        return now is before
    if now.kind != before.kind:
        return False
    if now.kind == LINK:
        return now.target == before.target
    if now.kind == DIR:
        return True
    return (now.size, now.mtime_ns, now.runs) == (before.size, before.mtime_ns, before.runs)


def same(host: Entry, guest: Entry) -> bool:
    """Tell whether the entries of the two sides are one and the same although nobody remembers copying them.

    A file that was copied in carries its source's time in whole seconds, one that was copied out the guest's own: a file
    that somebody wrote has such a time by chance once in a thousand million.
    """
    if host.kind != guest.kind:
        return False
    if host.kind == LINK:
        return host.target == guest.target
    if host.kind == DIR:
        return True
    if (host.size, host.runs) != (guest.size, guest.runs):
        return False
    return guest.mtime_ns in (host.mtime_ns, whole_seconds(host.mtime_ns))


def whole_seconds(mtime_ns: int) -> int:
    """Return a time as an archive carries it into a machine."""
    return mtime_ns // SECOND_NS * SECOND_NS


def copied_in(host: Entry) -> Entry:
    """Return what the guest has once a host's entry was copied in."""
    return replace(host, mtime_ns=whole_seconds(host.mtime_ns))


def time_ns(seconds: float) -> int:
    """Return nanoseconds for a time that a guest gave; 0 for one that is none."""
    if not 0 <= seconds < _TIME_MAX_NS / SECOND_NS:  # NaN too
        return 0
    return round(seconds * SECOND_NS)


def is_name(name: str) -> bool:
    """Tell whether a name can be used on both sides: one path component, text, not too long."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode()) <= NAME_BYTES_MAX
    except UnicodeEncodeError:
        return False


def leads_out(path: str, target: str) -> bool:
    """Tell whether a link at `path` with this target leads out of its tree, as far as its text tells."""
    if target.startswith("/") or "\0" in target or not target:
        return True
    depth = path.count("/")
    for part in target.split("/"):
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return True
    return False


def above(path: str) -> list[str]:
    """Return the folders above a path, outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]
