"""What host and machine had when they last agreed, kept beside the machine: one file for each agreement, by its mark.

The mark of an agreement is also left in the machine, on its disk. So a machine that comes back from an older snapshot says
by itself which agreement its files stem from, and is compared with that one: what it has not seen since is no removal, and
what it has in an older version is no change. An unknown mark means that nothing was ever agreed on.

Files appear by rename; a crash before leaves the agreement before. Blocking.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from recess.errors import OutOfSpace, Unavailable
from recess.volumes.merge import Pair

KEEP = 8
"""Agreements that are remembered, newest first: a snapshot older than that meets its host's files as a stranger."""

MARK_CHARS = 32
_MARK = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Seen:
    """One agreement: pairs by target and path. `at_rest`: the machine then ended in good order, its disk written."""

    mark: str
    at_rest: bool = False
    mounts: Mapping[str, Mapping[str, Pair]] = field(default_factory=dict)


def new_mark() -> str:
    """Return a mark that never was."""
    return secrets.token_hex(MARK_CHARS // 2)


class History:
    """The agreements of one machine, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, mark: str) -> Seen | None:
        """Return the agreement of this mark (which a guest may have made up), None if it is not known or not readable."""
        if not _MARK.fullmatch(mark):
            return None
        try:
            seen = msgspec.json.decode((self._folder / f"{mark}.json").read_bytes(), type=Seen)
        except (OSError, msgspec.MsgspecError):
            return None
        return seen if seen.mark == mark else None

    def save(self, seen: Seen) -> None:
        """Remember an agreement, durably, and forget the oldest. Raises OutOfSpace, Unavailable."""
        target = self._folder / f"{seen.mark}.json"
        temp = target.with_suffix(".new")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temp.open("wb") as out:
                out.write(msgspec.json.encode(seen))
                out.flush()
                os.fsync(out.fileno())
            temp.rename(target)
            for old in self._oldest():
                old.unlink(missing_ok=True)
        except OSError as exc:
            error = OutOfSpace if exc.errno == 28 else Unavailable
            raise error(f"what a volume holds cannot be noted: {exc.strerror or exc}") from exc

    def _oldest(self) -> list[Path]:
        """Return what is beyond the newest KEEP, and what a crash left."""
        files = sorted(self._folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        return [*files[KEEP:], *self._folder.glob("*.new")]
