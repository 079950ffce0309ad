"""What the driver holds of one running VM, and where its own files are in the run folder."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from recess.drivers.firecracker.api import Api, Refused
from recess.drivers.firecracker.host import HostFacts
from recess.drivers.firecracker.jail import Jail, descendants
from recess.drivers.firecracker.jail import remove as remove_jail
from recess.drivers.firecracker.journal import Journal
from recess.drivers.firecracker.ledger import Ledger
from recess.drivers.firecracker.port import Port
from recess.drivers.kept.cgroup import clear
from recess.drivers.kept.keeper import Keeper, Process, end_vm, last_words, read_pids, wait_gone
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import died, in_thread
from recess.errors import DriverFailed
from recess.machines.contract import Fingerprint, LazyMemory

RUNNING, PAUSED = "Running", "Paused"
"""What Firecracker calls the states of a VM that was started."""

_END_S = 5.0


@dataclass
class Handles:
    """One VM: where its files are, how to talk to its keeper, its API and its guest; what is known of its memory."""

    layout: Layout
    journal: Journal
    host: HostFacts
    fingerprint: Fingerprint
    keeper: Keeper
    api: Api
    port: Port
    ledger: Ledger
    jail: Jail | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    memory: str = ""  # how it was brought back, in words
    lazy: LazyMemory | None = None
    reset: bool = False  # since it was paused the guest was told that its connections are gone (capture.let_run)

    @contextlib.asynccontextmanager
    async def explain(self, what: str) -> AsyncIterator[None]:
        """Turn a lost connection inside the block into DriverFailed with how the VM ended and its last words."""
        try:
            yield
        except Refused:
            raise
        except DriverFailed as exc:
            obituary = await last_words(self.keeper)
            if obituary is None:
                raise
            raise died(what, obituary) from exc

    @property
    def clone(self) -> Path:
        """The disk's clone while a capture takes it."""
        return self.layout.directory / "disk.taken"

    async def close(self) -> None:
        """Drop every connection; the VM goes on."""
        if self.lazy is not None:
            await self.lazy.close()
        await self.port.close()
        self.keeper.close()


async def running(vm: Handles) -> bool:
    """Tell whether the vCPUs run."""
    return await vm.api.state() == RUNNING


def family(layout: Layout) -> list[Process]:
    """Return the keeper and everything below it, while it lives."""
    keeper = read_pids(layout).get("keeper")
    found: list[Process] = []
    for pid in descendants(keeper.pid) if keeper is not None and keeper.alive() else []:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            found.append(Process(pid, int(fields[19])))  # proc(5): its start, which tells it from a later one
    return found


async def end_machine(layout: Layout, keeper: Keeper | None, jail: Jail | None, group: str) -> None:
    """End keeper and VMM, whichever still lives, and remove the run folder, the jail and the control group (its path, "" for
    none). Never fails.

    In a jail the keeper's child is not Firecracker itself: the kernel ends that a moment later.
    """
    members = family(layout) if jail is not None else []
    await end_vm(layout, keeper)
    for process in members:
        if process.alive() and not await wait_gone(process.pid, _END_S):
            process.kill()
            await wait_gone(process.pid, _END_S)
    if jail is not None:
        remove_jail(jail)
    if group:
        await in_thread(clear, Path(group), _END_S)
