"""A VM that is being started: what of it is there already, so that whatever fails, all of it can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.cgroup import Groups, Limits, remove
from recess.drivers.kept.keeper import Keeper, end_vm
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import in_thread, unless_dead
from recess.drivers.qemu.linkport import LinkPort
from recess.drivers.qemu.qmp import Qmp
from recess.errors import DriverFailed

MONITOR_TIMEOUT_S = 30.0


class Begun:
    """Keeper, monitor and link of one VM, as far as they have come. `layout` is where it lives now."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.port: LinkPort | None = None
        self.keeper: Keeper | None = None
        self.qmp: Qmp | None = None

    def listen(self, hello_timeout_s: float) -> None:
        """Open the link's socket; to be done before QEMU starts."""
        self.port = LinkPort.open(self.layout, hello_timeout_s=hello_timeout_s)

    async def start(
        self, binary: Path, ram: Path, argv: Sequence[str], *, limits: Limits | None, tether: int | None = None,
        filtered: bool = False,
    ) -> None:  # fmt: skip
        """Start keeper and QEMU, within these limits where control groups are to be had, and connect to both; `filtered`:
        the keeper filters what the network card sends (card.py). Raises
        DriverFailed, Timeout, and OSError for a group that cannot be made."""
        await in_thread(_launch, binary, self.layout, ram, argv, limits, tether, filtered)
        await self.find("start")

    async def find(self, what: str) -> None:
        """Connect to keeper and QEMU, which run. Raises DriverFailed, Timeout."""
        self.keeper = Keeper.connect(self.layout)
        self.qmp = await unless_dead(self.keeper, what, Qmp.connect(self.layout.run, timeout_s=MONITOR_TIMEOUT_S))

    def whole(self) -> tuple[LinkPort, Keeper, Qmp]:
        """Return all three. Raises DriverFailed before they are there."""
        if self.port is None or self.keeper is None or self.qmp is None:
            raise DriverFailed("the VM's start has not come so far", log="")
        return self.port, self.keeper, self.qmp

    async def undo(self, *, keep_disk: bool) -> None:
        """End what there is, and remove its files; the disk stays with `keep_disk`. Never fails."""
        await end_vm(self.layout, self.keeper)
        if self.port is not None:
            await self.port.close()
        if self.qmp is not None:
            await self.qmp.close()
        if self.keeper is not None:
            self.keeper.close()
        if keep_disk:
            self.layout.disk_base.unlink(missing_ok=True)
        else:
            self.layout.remove_disks()


def _launch(
    binary: Path, layout: Layout, ram: Path, argv: Sequence[str], limits: Limits | None, tether: int | None,
    filtered: bool,
) -> None:  # fmt: skip
    group = None if limits is None else Groups.find().make(limits)
    try:
        keepers.launch(binary, layout, ram, argv, tether=tether, group=group, filtered=filtered)
    except BaseException:
        if group is not None:
            remove(group)
        raise
