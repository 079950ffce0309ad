"""The journal of one VM: what a restarted server must know to take it over. One small JSON file, written whole.

`phase` is "starting" until boot or restore has returned: a VM found in that phase is half made and is ended.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import msgspec

from recess.drivers.kept.capturing import write_whole
from recess.drivers.kept.layout import Layout
from recess.machines.contract import Fingerprint, VmSpec


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
    fingerprint: Fingerprint | None = None  # of the QEMU that runs it, which may be another than a later server finds


def write_journal(layout: Layout, journal: Journal) -> None:
    """Write it in one step (temp name, rename); the folder is in memory, so there is nothing to sync."""
    write_whole(layout.journal, msgspec.json.encode(dataclasses.replace(journal), enc_hook=str))


def read_journal(layout: Layout) -> Journal | None:
    """Return the journal, or None if there is none or it is not whole (its VM is then not worth keeping)."""
    try:
        data = layout.journal.read_bytes()
        journal = msgspec.json.decode(data, type=Journal, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.DecodeError):
        return None
    return journal if (journal.driver, journal.version) == ("qemu", 1) else None
