"""The driver suite on VMs that waited in the warm pool: whoever uses one can tell no difference."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuDriver, QemuVm
from recess.drivers.qemu.pool_member import FOLDER
from recess.images.disk import data_extents
from recess.machines.contract import DISK_NAME, Driver, RestoreParts, TemplateRef, Vm
from recess.testing.driver_suite import DriverSuite, Rig, shell
from recess.testing.qemu_rig import QemuHome, QemuRig, prime_pool, vm_processes

pytestmark = pytest.mark.machines


@dataclass
class PoolRig(QemuRig):
    """Every restore over a template takes a VM that waits; which is checked."""

    drivers: list[QemuDriver] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def make_driver(self) -> QemuDriver:
        self.drivers.append(QemuDriver(replace(self.qemu.config, warm_pool_max=2)))
        return self.drivers[-1]

    async def restore(self, driver: Driver, parts: RestoreParts) -> Vm:
        if parts.template is None:
            return await super().restore(driver, parts)
        async with self.turn:
            await self.prime(driver, parts.template)
            vm = await super().restore(driver, parts)
        assert isinstance(vm, QemuVm)
        assert vm.about_memory()["start"] == "it waited in the warm pool"
        return vm

    async def prime(self, driver: Driver, template: TemplateRef) -> None:
        assert isinstance(driver, QemuDriver)
        (self.home / "machines").mkdir(exist_ok=True)
        await prime_pool(driver, self.spec, template, self.home / "machines")

    def leftovers(self) -> list[str]:
        """What waits is nobody's machine. Its folder is where it stands; one that just starts stands elsewhere, and names it."""
        waiting = str(self.qemu.run_dir / FOLDER)
        return [left for left in super().leftovers() if waiting not in left]


class TestQemuDriverWithItsPool(DriverSuite):
    @pytest.fixture
    async def rig(self, tmp_path: Path, images_dir: Path) -> AsyncIterator[Rig]:
        home = QemuHome.shared(images_dir)
        rig = PoolRig(home=tmp_path, spec=home.spec, qemu=home)
        yield rig
        await asyncio.gather(*(driver.close() for driver in rig.drivers))
        assert super(PoolRig, rig).leftovers() == []
        assert vm_processes(home.run_dir) == []
        assert list((home.run_dir / FOLDER).glob("*")) == []

    @pytest.fixture(params=("restored",))  # from a fork that waited, too
    async def vm(self, rig: Rig, driver: Driver, request: pytest.FixtureRequest) -> AsyncIterator[Vm]:
        vm = await rig.live(driver, request.param)
        yield vm
        await vm.kill()
        assert rig.leftovers() == []

    async def test_its_disk_boots_again_after_its_end(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """How a disk boots has nothing to do with the pool; that a VM which ends by itself leaves its disk under the
        machine's name, where it got it only when the VM was taken, has."""
        await shell(vm.link, "echo kept-after-the-end > /root/file; sync")
        assert isinstance(vm, QemuVm)
        os.kill(read_pids(vm._handles.layout)["vmm"].pid, signal.SIGKILL)
        await vm.wait_dead()
        left = self.directory_of(rig, vm) / DISK_NAME
        assert left.stat().st_size == rig.spec.disk_bytes
        with left.open("rb") as file:
            pieces = [os.pread(file.fileno(), end - start, start) for start, end in data_extents(file.fileno())]
        assert any(b"kept-after-the-end" in piece for piece in pieces)
