"""The journal of one VM: what a restarted server must know to take it over. One small JSON file, written whole.

`phase` is "starting" until boot or restore has returned: a VM found in that phase is half made and is ended. What is known
of its memory is in the ledger (ledger.py), the mark of a capture under way beside both (qemu/journal.py has its form).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from recess.drivers.kept.layout import Layout
from recess.images.files import space_errors
from recess.machines.contract import Fingerprint, VmSpec

_VERSION = 1


@dataclass(frozen=True)
class Journal:
    """Everything about a VM that is not in its process or its ledger. Paths are absolute, as text, "" for none."""

    vm_id: str
    directory: str
    spec: VmSpec
    phase: str  # starting | running
    template_ram: str = ""
    template_disk: str = ""
    for_template: bool = False
    jailed: str = ""  # the binary that runs in the VM's jail; "" without one
    group: str = ""  # its control group; "" without one
    version: int = _VERSION
    driver: str = "firecracker"
    fingerprint: Fingerprint | None = (
        None  # of the Firecracker that runs it, which may be another than a later server finds
    )

    @property
    def base(self) -> str:
        """What captures count from, as the contract calls it."""
        return "template" if self.template_ram else "boot"

    @property
    def ram_base(self) -> Path | None:
        """The template's memory."""
        return Path(self.template_ram) if self.template_ram else None

    @property
    def disk_base(self) -> Path | None:
        """The template's disk."""
        return Path(self.template_disk) if self.template_disk else None


def write_journal(layout: Layout, journal: Journal) -> None:
    """Write it in one step (temp name, rename); the folder is in memory, so there is nothing to sync."""
    aside = layout.journal.with_name("vm.json.new")
    with space_errors(str(aside)):
        aside.write_bytes(msgspec.json.encode(journal, enc_hook=str))
        aside.replace(layout.journal)


def read_journal(layout: Layout) -> Journal | None:
    """Return the journal, or None if there is none or it is not whole (its VM is then not worth keeping)."""
    try:
        data = layout.journal.read_bytes()
        journal = msgspec.json.decode(data, type=Journal, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.MsgspecError):
        return None
    return journal if (journal.driver, journal.version) == ("firecracker", _VERSION) else None
