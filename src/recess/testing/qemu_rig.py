"""What tests need to run real VMs on QEMU: a home with the shared images, and one template a test process.

Templates, machines and sockets are below a run folder of this process, which is removed at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from recess.config import Config, load_config
from recess.drivers.qemu import QemuDriver, QemuVm
from recess.drivers.qemu.pool_member import order_for
from recess.images.boot import ensure_boot_files
from recess.images.disk import clone_sparse, ensure_blank_disk
from recess.images.store import ImageStore
from recess.machines.contract import DISK_NAME, BootFiles, TemplateRef, Vm, VmSpec
from recess.testing.driver_suite import Rig, new_thaw, shell
from recess.units import GIB, MIB

MEMORY_BYTES = 256 * MIB
DISK_BYTES = 2 * GIB


def vm_processes(run_dir: Path) -> list[str]:
    """Return the folders and command lines of keepers and VMMs of this run folder, from /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and str(run_dir) in (text := (folder / "cmdline").read_text()):
                words = text.split("\0")
                if "keeper" in words[0] or "qemu" in words[0]:
                    found.append(f"{(folder / 'cwd').readlink()}: {' '.join(words)[:100]}")
    return found


async def prime_pool(driver: QemuDriver, spec: VmSpec, template: TemplateRef, machines: Path) -> None:
    """Return when a VM of this template waits for the next restore of a machine in the folder `machines`."""
    pool = await driver._warm_pool()
    place = await driver._place("nobody", spec, machines / "nobody")
    order = order_for(place.layout, spec, template, place.host, place.keeper_binary, place.hello_timeout_s)
    with pool.under_way(order):
        pass
    await pool.settled()


def spec_of(config: Config) -> VmSpec:
    """Return a small machine of the image `base`. Raises NotFound or MissingTool when the set-up was not run."""
    files = ensure_boot_files(config.images_dir, config.bin_dir / "guestd", kernel=config.kernel)
    image = ImageStore(config.images_dir).get("base")
    boot = BootFiles(files.kernel, files.kernel_hash, files.initrd, files.initrd_hash, image.root_path, image.root_hash)
    return VmSpec(memory_bytes=MEMORY_BYTES, cpus=1, disk_bytes=DISK_BYTES, boot=boot)


class QemuHome:
    """One per test process: a run folder, a home whose images are the shared ones, and the template to fork from."""

    def __init__(self, images_dir: Path) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="recess-test-", dir="/dev/shm"))
        home = self.run_dir / "home"
        home.mkdir()
        (home / "images").symlink_to(images_dir)
        # Nothing waits unless a test is about that: what is left at its end is then a leftover.
        self.config = load_config(home=str(home), run_dir=str(self.run_dir), warm_pool_max=0)
        self.spec = spec_of(self.config)
        self._templates: dict[bool, TemplateRef] = {}

    @staticmethod
    @functools.cache
    def shared(images_dir: Path) -> QemuHome:
        """Return this process's; its folder goes when the process ends."""
        home = QemuHome(images_dir)
        atexit.register(home.close)
        return home

    async def template(self, *, devices_command: bool = True) -> TemplateRef:
        """Return the process's template; boots it on first use."""
        if devices_command not in self._templates:
            name = f"template{int(devices_command)}"
            with tempfile.TemporaryDirectory() as temp:
                self.blank_disk(Path(temp))
                driver = QemuDriver(self.config, devices_command=devices_command)
                vm = await driver.boot(name, self.spec, Path(temp), for_template=True)
                try:
                    await vm.link.thaw(new_thaw())
                    await shell(vm.link, "cat /root/* /etc/* > /dev/null 2>&1; sync")
                    await vm.link.freeze(sync=True)
                    self._templates[devices_command] = await vm.export_template(self.run_dir / name)
                finally:
                    await vm.kill()
        return self._templates[devices_command]

    def blank_disk(self, directory: Path) -> None:
        """Put a formatted disk into a machine's directory."""
        blank = ensure_blank_disk(self.config.images_dir, self.spec.disk_bytes)
        clone_sparse(blank.path, directory / DISK_NAME)

    def close(self) -> None:
        """Remove the run folder."""
        shutil.rmtree(self.run_dir, ignore_errors=True)


@dataclass
class QemuRig(Rig):
    """A `Rig` over a `QemuHome`."""

    qemu: QemuHome
    devices_command: bool = True

    def make_driver(self) -> QemuDriver:
        """Return a new driver object."""
        return QemuDriver(self.qemu.config, devices_command=self.devices_command)

    async def template(self) -> TemplateRef:
        """Return the process's template."""
        return await self.qemu.template(devices_command=self.devices_command)

    def make_disk(self, directory: Path) -> None:
        """Put a formatted disk there."""
        self.qemu.blank_disk(directory)

    async def lose(self, vm: Vm) -> None:
        """Drop the connections."""
        assert isinstance(vm, QemuVm)
        await vm.detach()

    def leftovers(self) -> list[str]:
        """Return processes, run folders and disks that are still there."""
        folder = self.qemu.run_dir / "m"
        folders = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
        disks = [str(path) for path in (self.home / "machines").glob("*/disk*")]
        return [*vm_processes(self.qemu.run_dir), *folders, *disks]
