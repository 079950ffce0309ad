"""Named volumes: folders that this node keeps for machines, each by its name.

A volume is its folder; there is nothing else to lose. Blocking. It must not know who uses them.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from recess.errors import BadInput, Conflict, NotFound, OutOfSpace, Unavailable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class NamedVolume:
    """One volume: `files` and `bytes` are of everything in it, `created` in wall seconds."""

    name: str
    path: str
    created: float
    files: int
    bytes: int


def check_volume_name(name: str) -> str:
    """Return the name. Raises BadInput for one that no volume can have."""
    if not NAME.fullmatch(name):
        raise BadInput(
            f"not a volume's name: {name[:80]!r}", hint="letters, digits, dots, dashes; a folder begins with / or ./"
        )
    return name


class NamedVolumes:
    """The volumes of a node, below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Return a volume's folder. Raises BadInput, NotFound."""
        path = self._folder / check_volume_name(name)
        if not path.is_dir():
            raise NotFound(f"no such volume: {name}", hint=f"recess volume create {name}", kind="volume", ref=name)
        return path

    def ensure(self, name: str) -> Path:
        """Return a volume's folder, made if there is none. Raises BadInput, OutOfSpace, Unavailable."""
        path = self._folder / check_volume_name(name)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            error = OutOfSpace if exc.errno == 28 else Unavailable
            raise error(f"volume {name}: {exc.strerror}") from exc
        return path

    def create(self, name: str) -> NamedVolume:
        """Make a volume; one that is there is no error, as with Docker."""
        self.ensure(name)
        return self.get(name)

    def get(self, name: str) -> NamedVolume:
        """Return a volume with its figures. Raises BadInput, NotFound."""
        path = self.path(name)
        files = used = 0
        for root, _, names in os.walk(path):
            for one in names:
                try:
                    info = Path(root, one).lstat()
                except FileNotFoundError:
                    continue
                files, used = files + 1, used + info.st_blocks * 512
        return NamedVolume(name, str(path), path.stat().st_mtime, files, used)

    def list_all(self) -> list[NamedVolume]:
        """Return every volume, by name."""
        names = sorted(p.name for p in self._folder.iterdir() if p.is_dir()) if self._folder.is_dir() else []
        return [self.get(name) for name in names if NAME.fullmatch(name)]

    def remove(self, name: str, *, users: list[str]) -> None:
        """Remove a volume and what is in it. Raises NotFound, Conflict while machines (`users`, names) have it."""
        path = self.path(name)
        if users:
            raise Conflict(
                f"volume {name} is used by {', '.join(users[:5])}", hint="remove these machines first", machines=users
            )
        gone = path.with_name(f".gone-{name}")  # at once out of sight: a crash leaves no half of a volume
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
