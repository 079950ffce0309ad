"""The journal of one machine: what a restarted server must know to take it over. One small file, written whole.

`phase` is "starting" until boot or restore has returned: a machine found in that phase is half made and is ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from recess.drivers.kept.layout import Layout
from recess.machines.contract import Fingerprint, VmSpec


@dataclass(frozen=True)
class Journal:
    """Everything about a machine that is not in its processes. `template_ram`: the template's file, `group`: its control
    group; "" without one."""

    spec: VmSpec
    phase: str  # starting | running
    template_ram: str
    for_template: bool = False
    group: str = ""
    fingerprint: Fingerprint | None = None  # of the runsc that runs it, which may be another than a later server finds
    driver: str = "gvisor"
    version: int = 1


def write_journal(layout: Layout, journal: Journal) -> None:
    """Write it in one step; the folder is in memory, so there is nothing to sync."""
    aside = layout.journal.with_name("vm.json.new")
    aside.write_bytes(msgspec.json.encode(journal, enc_hook=str))
    aside.replace(layout.journal)


def read_journal(layout: Layout) -> Journal | None:
    """Return the journal, or None if there is none or it is not ours or not whole."""
    try:
        data = layout.journal.read_bytes()
        journal = msgspec.json.decode(data, type=Journal, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.DecodeError):
        return None
    return journal if (journal.driver, journal.version) == ("gvisor", 1) else None


def bundle(layout: Layout) -> Path:
    """Where the machine's bundle is."""
    return layout.run / "b"


def state(layout: Layout) -> Path:
    """Where runsc keeps what it knows of the machine (short: a socket is in it)."""
    return layout.run / "s"


def init(layout: Layout) -> Path:
    """The folder that the machine sees as `/.recess`."""
    return layout.run / "i"


def known(layout: Layout) -> Path:
    """Which pages have numbers already, for captures of the next server."""
    return layout.run / "known.npz"


def image(layout: Layout) -> Path:
    """Where an image passes through."""
    return layout.run / "c"
