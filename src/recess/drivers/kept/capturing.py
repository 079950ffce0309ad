"""A note in the run folder that a capture has the VM stopped, for the server that comes after one that died in it.

The file `capturing` exists from before a capture stops the VM until after it runs again (or is meant to stay stopped); it
holds "running" or "paused", the state to go back to.
"""

from __future__ import annotations

import os
from pathlib import Path

from recess.drivers.kept.layout import Layout


def mark_capturing(layout: Layout, state: str) -> None:
    """Note the state ("running", "paused") that a capture starts from."""
    write_whole(layout.capturing, state.encode())


def clear_capturing(layout: Layout) -> None:
    """Forget it: the VM is in the state it is meant to be in."""
    layout.capturing.unlink(missing_ok=True)


def interrupted_capture(layout: Layout) -> str:
    """Return the state before the capture that an earlier server did not finish, or ""."""
    try:
        return layout.capturing.read_text()
    except OSError:
        return ""


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file in one step (temp name, rename); the folder is in memory, so there is nothing to sync."""
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    aside.replace(path)
