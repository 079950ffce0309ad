"""What the driver holds of one running VM, and the small moves that more than one of its procedures need."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from recess.drivers.kept.keeper import Keeper, last_words
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import died
from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.journal import Journal
from recess.drivers.qemu.linkport import LinkPort
from recess.drivers.qemu.memory import UNTRACKED, Tracking
from recess.drivers.qemu.qmp import Qmp, QmpRefused
from recess.errors import DriverFailed
from recess.machines.contract import Fingerprint, LazyMemory

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Handles:
    """One VM: where its files are, how to talk to its keeper, monitor and guest."""

    layout: Layout
    journal: Journal
    host: HostFacts
    fingerprint: Fingerprint
    port: LinkPort
    keeper: Keeper
    qmp: Qmp
    timings_s: dict[str, float] = field(default_factory=dict)
    tracking: Tracking = UNTRACKED
    memory: str = ""  # how it was brought back, in words
    start: str = ""  # how its process came about, in words
    lazy: LazyMemory | None = None
    disk_after: int = 0  # the capture whose blocks can be committed, by its generation (blocks.py); 0: none

    @contextlib.asynccontextmanager
    async def explain(self, what: str) -> AsyncIterator[None]:
        """Turn a lost connection inside the block into DriverFailed with how the VM ended and its last words."""
        try:
            yield
        except QmpRefused:
            raise
        except DriverFailed as exc:
            obituary = await last_words(self.keeper)
            if obituary is None:
                raise
            raise died(what, obituary) from exc

    async def running(self) -> bool:
        """Tell whether the vCPUs run."""
        return bool((await self.qmp.execute("query-status"))["running"])

    async def close(self) -> None:
        """Drop every connection; the VM goes on."""
        if self.lazy is not None:
            await self.lazy.close()
        await self.port.close()
        await self.qmp.close()
        self.keeper.close()


@contextlib.asynccontextmanager
async def passed_file(qmp: Qmp, fd: int) -> AsyncIterator[str]:
    """Hand QEMU a descriptor and yield a file name for it, valid for commands inside the block."""
    number = (await qmp.execute("add-fd", fd=fd))["fdset-id"]
    try:
        yield f"/dev/fdset/{number}"
    finally:
        with contextlib.suppress(DriverFailed):
            await qmp.execute("remove-fd", {"fdset-id": number})
