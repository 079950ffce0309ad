"""The disk of a machine that has no VM: kept under a name of this room's own, so that no driver removes it.

A driver's file is `disk.raw` (`contract.DISK_NAME`) and goes with `Vm.kill`. A hard link, `disk.kept`, keeps the content:

    keep   disk.raw -> disk.kept    before a VM is ended whose files shall live on, and when one was found dead
    lay    disk.kept -> disk.raw    before a cold boot
    drop   disk.kept                once the machine runs again, or its disk is in a snapshot that was stored

A crash between any two steps leaves either one name or both, of the same file: the content is lost only when both names
are removed on purpose. A running machine with both names (a crash right after a cold boot) is whole: the next `keep`
or `drop` ends that. Synchronous and quick (links, never copies). It must know nothing of rows, states or drivers.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from recess.errors import Unavailable
from recess.machines.contract import DISK_NAME

KEPT_NAME = "disk.kept"


def keep(directory: Path) -> bool:
    """Give the disk that is in `directory` its kept name, in place of an older kept one; False if there is none.

    Raises Unavailable where the file system has no hard links.
    """
    aside = directory / f".{KEPT_NAME}.{secrets.token_hex(4)}"
    try:
        os.link(directory / DISK_NAME, aside)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise Unavailable(f"the disk in {directory} cannot be kept: {exc.strerror}") from exc
    if is_kept(directory) and (directory / KEPT_NAME).samefile(aside):
        aside.unlink()  # renaming one link over another of the same file would leave both
    else:
        aside.replace(directory / KEPT_NAME)
    return True


def is_kept(directory: Path) -> bool:
    """Tell whether a disk is kept there."""
    return (directory / KEPT_NAME).is_file()


def size_of(directory: Path) -> int:
    """Return the kept disk's size in bytes (its end, not what it occupies), 0 if there is none."""
    try:
        return (directory / KEPT_NAME).stat().st_size
    except FileNotFoundError:
        return 0


def lay(directory: Path) -> None:
    """Put the kept disk where a driver boots from; it stays kept. Raises Unavailable."""
    clear(directory)
    try:
        os.link(directory / KEPT_NAME, directory / DISK_NAME)
    except OSError as exc:
        raise Unavailable(f"the kept disk in {directory} cannot be used: {exc.strerror}") from exc


def clear(directory: Path) -> None:
    """Remove the driver's name of a disk that no VM uses."""
    (directory / DISK_NAME).unlink(missing_ok=True)


def drop(directory: Path) -> None:
    """Forget the kept disk."""
    (directory / KEPT_NAME).unlink(missing_ok=True)
