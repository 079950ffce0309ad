"""The journal of one VM: what a restarted server must know to take it over. One small JSON file, written whole.

`phase` is "starting" until boot or restore has returned: a VM found in that phase is half made and is ended. Beside
it the file `capturing` exists from before a capture stops the VM until after it runs again (or is meant to stay
stopped); it holds "running" or "paused", the state to go back to should the server die in between.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from recess.drivers.qemu.layout import Layout
from recess.machines.contract import VmSpec


@dataclass(frozen=True)
class Journal:
    """Everything about a VM that is not in the process itself. Paths are absolute, as text."""

    vm_id: str
    directory: str
    spec: VmSpec
    phase: str  # starting | running
    ram: str
    base: str  # boot | template
    disk_base: str
    accelerator: str
    shared: bool  # RAM is mapped shared: pages are found in the file, not by who owns them
    for_template: bool = False
    version: int = 1
    driver: str = "qemu"


def write_journal(layout: Layout, journal: Journal) -> None:
    """Write it in one step (temp name, rename); the folder is in memory, so there is nothing to sync."""
    _write_whole(layout.journal, msgspec.json.encode(dataclasses.replace(journal), enc_hook=str))


def read_journal(layout: Layout) -> Journal | None:
    """Return the journal, or None if there is none or it is not whole (its VM is then not worth keeping)."""
    try:
        data = layout.journal.read_bytes()
        journal = msgspec.json.decode(data, type=Journal, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.DecodeError):
        return None
    return journal if (journal.driver, journal.version) == ("qemu", 1) else None


def mark_capturing(layout: Layout, state: str) -> None:
    """Note the state ("running", "paused") that a capture starts from."""
    _write_whole(layout.capturing, state.encode())


def clear_capturing(layout: Layout) -> None:
    """Forget it: the VM is in the state it is meant to be in."""
    layout.capturing.unlink(missing_ok=True)


def interrupted_capture(layout: Layout) -> str:
    """Return the state before the capture that an earlier server did not finish, or ""."""
    try:
        return layout.capturing.read_text()
    except OSError:
        return ""


def _write_whole(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    aside.replace(path)
