"""Run folders whose home is gone: they lie in memory, and nobody else would ever give that back.

A run folder names its home in the file `home`. One whose home was removed (a home is a folder, people remove folders)
holds templates' memory until the host reboots, so a server that starts removes those of its own user, unless a process
still lives in it: a VM of such a home ends by its keeper's deadline, and the next server looks again.

It must know nothing of what is in a run folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from recess.config import Config

_NAME = "home"
_PATH_BYTES_MAX = 4096


def claim_run_dir(config: Config) -> None:
    """Write down whose run folder this is. May be called again."""
    record = config.run_dir / _NAME
    text = f"{config.home}\n"
    with contextlib.suppress(OSError):  # unclaimed it is merely never removed
        if not record.exists() or record.read_text() != text:
            record.write_text(text)


def remove_orphans(config: Config) -> list[Path]:
    """Remove this user's run folders beside ours whose home does not exist any more; return them."""
    gone = []
    for folder in sorted(config.run_dir.parent.glob(f"recess-{os.getuid()}-*")):
        if folder != config.run_dir and _is_ours(folder) and _is_orphan(folder) and not _lived_in(folder):
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
    return gone


def _is_ours(folder: Path) -> bool:
    return not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()


def _is_orphan(folder: Path) -> bool:
    try:
        with (folder / _NAME).open("rb") as record:
            home = Path(os.fsdecode(record.read(_PATH_BYTES_MAX)).removesuffix("\n"))
        home.lstat()
    except FileNotFoundError:
        # No record: not ours to judge. A record and no such home: gone.
        return (folder / _NAME).exists()
    except (OSError, ValueError):
        return False  # a home on a disk that does not answer now is not gone
    return False


def _lived_in(folder: Path) -> bool:
    """Tell whether any process works in it, as keepers and VMMs do; what cannot be looked at counts as one that does."""
    inside = f"{folder}/"
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            place = link.readlink()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's: it cannot be in a folder that is private to us
        if f"{place}/".startswith(inside):
            return True
    return False
