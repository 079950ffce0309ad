"""The fake driver passes the driver suite."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recess.drivers.fake import FakeDriver, FakeHost
from recess.guestlink.link import ExecRequest
from recess.machines.contract import DISK_NAME, BootFiles, Driver, TemplateRef, Vm, VmSpec
from recess.testing.driver_suite import DriverSuite, Rig, new_thaw

NOWHERE = Path("/nonexistent")
SPEC = VmSpec(64 << 20, 1, 64 << 20, BootFiles(NOWHERE, "k" * 64, NOWHERE, "i" * 64, NOWHERE, "r" * 64))


@dataclass
class FakeRig(Rig):
    host: FakeHost = field(default_factory=FakeHost)
    made: TemplateRef | None = None

    def make_driver(self) -> Driver:
        return FakeDriver(host=self.host)

    async def template(self) -> TemplateRef:
        if self.made is None:
            driver = FakeDriver()  # a host of its own: it is no machine of the test
            directory = self.home / "template-vm"
            directory.mkdir()
            self.make_disk(directory)
            vm = await driver.boot("tpl_1", self.spec, directory, for_template=True)
            await vm.link.thaw(new_thaw())
            await (await vm.link.exec(ExecRequest(["sh", "-c", "true"]))).wait()
            await vm.link.freeze(sync=True)
            self.made = await vm.export_template(self.home / "template")
        return self.made

    def make_disk(self, directory: Path) -> None:
        with (directory / DISK_NAME).open("wb") as disk:
            disk.truncate(self.spec.disk_bytes)

    async def lose(self, vm: Vm) -> None:
        await vm.detach()

    def leftovers(self) -> list[str]:
        return [*self.host.vms, *map(str, self.home.glob(f"machines/*/{DISK_NAME}"))]


class TestFakeDriver(DriverSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Rig:
        return FakeRig(home=tmp_path, spec=SPEC)
