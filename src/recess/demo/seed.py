"""The story's template, kept from one telling to the next.

Booting and warming a template is the slowest thing of all, and the story's home is new each time. So a home that holds
nothing but the template (its database and blobs, no machine, no session) is kept beside the user's home and copied
into each new one. It is a cache: without it, or with one that fits no more, the server makes the template again.

A seed is copied from a home whose server has ended, into a temporary folder, and renamed: never half a seed.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from recess import __version__

_PARTS = ("recess.db*", "blobs")


def seed_path(user_home: Path) -> Path:
    """Return where the seed of this version lies."""
    return user_home / f"demo-seed-{__version__}"


def blobs_of(home: Path) -> frozenset[str]:
    """Return the names of a home's blobs: what changes when a template is made."""
    return frozenset(str(p.relative_to(home)) for p in (home / "blobs").rglob("*") if p.is_file())


def sow(seed: Path, home: Path) -> bool:
    """Copy a seed into a new home; tell whether there was one."""
    if not seed.is_dir():
        return False
    _copy(seed, home)
    return True


def keep(home: Path, seed: Path) -> None:
    """Make this home's template the seed. No server may run on the home."""
    fresh = Path(tempfile.mkdtemp(prefix=".demo-seed-", dir=seed.parent))
    try:
        _copy(home, fresh)
        shutil.rmtree(seed, ignore_errors=True)
        fresh.rename(seed)
    except OSError:
        # Another telling was faster, or the disk is full: the story goes on without a seed.
        shutil.rmtree(fresh, ignore_errors=True)


def forget(seed: Path) -> None:
    """Drop a seed that no server starts from."""
    with contextlib.suppress(OSError):
        shutil.rmtree(seed)


def _copy(source: Path, target: Path) -> None:
    for pattern in _PARTS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copy2(path, target / path.name)
