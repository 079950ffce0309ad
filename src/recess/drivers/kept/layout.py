"""Where one VM's files are, and how its sockets are reached. The run folder is flat and belongs to the keeper.

    RUN_DIR/m/ID/          in shared memory, removed by the keeper when the VM is gone
      vm.json              journal: what the server knew when it started the VM (see journal.py)
      pids                 keeper and VMM, each with its start time (written by the keeper)
      keeper.sock qmp.sock link.sock       vmm.log       ram (machines that were booted)
    DIRECTORY/             the machine's own, on the home's disk
      disk.raw             the writable disk            disk.delta   blocks it had at the restore (see disk.py)
      console.log          bounded                      vmm.end      how the VMM ended, in one line and its last words

A unix socket's path may have 107 bytes only, and home folders of users and tests are longer: sockets are therefore
bound and connected by way of `/proc/self/fd`, and QEMU and the keeper use names relative to the run folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recess.errors import BadInput
from recess.machines.contract import CONSOLE_NAME, DISK_NAME

JOURNAL_NAME = "vm.json"
KEEPER_SOCKET = "keeper.sock"
MONITOR_SOCKET = "qmp.sock"
LINK_SOCKET = "link.sock"


@dataclass(frozen=True)
class Layout:
    """The paths of one VM. `run` is its run folder, `directory` the machine's own."""

    run: Path
    directory: Path

    @property
    def ram(self) -> Path:
        """The RAM file of a machine that was booted (forks map their template's)."""
        return self.run / "ram"

    @property
    def journal(self) -> Path:
        """What a restarted server needs."""
        return self.run / JOURNAL_NAME

    @property
    def capturing(self) -> Path:
        """Exists while a capture has the VM stopped."""
        return self.run / "capturing"

    @property
    def pids(self) -> Path:
        """The keeper's record of itself and the VMM."""
        return self.run / "pids"

    @property
    def log(self) -> Path:
        """The VMM's own output."""
        return self.run / "vmm.log"

    @property
    def device_state(self) -> Path:
        """Where QEMU writes its device state."""
        return self.run / "device.state"

    @property
    def disk(self) -> Path:
        """The writable disk."""
        return self.directory / DISK_NAME

    @property
    def disk_base(self) -> Path:
        """The writable disk as it was at a cold boot (forks have their template's)."""
        return self.directory / "disk.base"

    @property
    def disk_delta(self) -> Path:
        """The blocks that a restore put over the template's disk."""
        return self.directory / "disk.delta"

    @property
    def console(self) -> Path:
        """The serial console."""
        return self.directory / CONSOLE_NAME

    def console_tail(self, limit: int) -> bytes:
        """Return the last bytes of the console, also of a VM that is gone; none if it cannot be read."""
        try:
            with self.console.open("rb") as handle:
                handle.seek(max(0, handle.seek(0, os.SEEK_END) - limit))
                return handle.read(limit)
        except OSError:
            return b""

    @property
    def end_record(self) -> Path:
        """How the VMM ended."""
        return self.directory / "vmm.end"

    def remove_run(self) -> None:
        """Remove the run folder, if the keeper has not."""
        shutil.rmtree(self.run, ignore_errors=True)

    def remove_disks(self) -> None:
        """Remove what the driver keeps in the machine's directory, except the console and the record of the end."""
        for path in (self.disk, self.disk_base, self.disk_delta):
            path.unlink(missing_ok=True)


def driver_in(run: Path) -> str:
    """Return the name of the driver whose VM has this run folder, by its journal ("" while there is none that can be
    read; a journal that names no driver is QEMU's)."""
    try:
        said = json.loads((run / JOURNAL_NAME).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(said.get("driver", "qemu")) if isinstance(said, dict) else ""


def vms_in(run_dir: Path, drivers: Collection[str]) -> list[str]:
    """Return the ids of the VMs that have a run folder and are of one of these drivers ("": of nobody one can tell)."""
    folder = run_dir / "m"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if driver_in(path) in drivers)


def layout_for(run_dir: Path, vm_id: str, directory: Path) -> Layout:
    """Return the layout of a VM. Raises BadInput for an id that is no plain file name."""
    if not vm_id or "/" in vm_id or vm_id.startswith(".") or "\0" in vm_id:
        raise BadInput(f"not a VM id: {vm_id!r}")
    return Layout(run_dir.absolute() / "m" / vm_id, directory.absolute())


@contextmanager
def socket_address(folder: Path, name: str) -> Iterator[str]:
    """Yield a short address of a socket in `folder`, valid inside the block."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
