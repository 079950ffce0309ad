"""What tests need to run real Firecracker VMs: a home with the shared images, and one template a test process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from recess.config import Config, load_config
from recess.drivers.firecracker import FirecrackerDriver
from recess.drivers.firecracker.host import read_host
from recess.errors import RecessError
from recess.images.disk import clone_sparse, ensure_blank_disk
from recess.machines.contract import DISK_NAME, TemplateRef, Vm, VmSpec
from recess.testing.driver_suite import Rig, new_thaw, shell
from recess.testing.qemu_rig import spec_of


def why_no_firecracker() -> str:
    """Return why Firecracker cannot be tested with here, "" if it can: a binary is named, and KVM may be opened."""
    config = load_config()
    if not config.firecracker_bin:
        return "RECESS_FIRECRACKER_BIN names no binary"
    try:
        read_host(config)
    except RecessError as exc:
        return exc.message
    return ""


def machine_processes(run_dir: Path) -> list[str]:
    """Return the command lines of keepers and VMMs of this run folder, from /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not folder.name.isdigit():
                continue
            words = (folder / "cmdline").read_text().split("\0")
            inside = str(run_dir) in " ".join(words) or str((folder / "cwd").readlink()).startswith(str(run_dir))
            if inside and any(name in words[0] for name in ("keeper", "firecracker")):
                found.append(" ".join(words)[:100])
    return found


class FirecrackerHome:
    """One per test process: a run folder, a home whose images are the shared ones, and the template to fork from."""

    def __init__(self, images_dir: Path) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="recess-fc-", dir="/dev/shm"))
        home = self.run_dir / "home"
        home.mkdir()
        (home / "images").symlink_to(images_dir)
        self.config: Config = load_config(home=str(home), run_dir=str(self.run_dir))
        self.spec: VmSpec = spec_of(self.config)
        self._template: TemplateRef | None = None

    @staticmethod
    @functools.cache
    def shared(images_dir: Path) -> FirecrackerHome:
        """Return this process's; its folder goes when the process ends."""
        home = FirecrackerHome(images_dir)
        atexit.register(home.close)
        return home

    async def template(self) -> TemplateRef:
        """Return the process's template; boots it on first use."""
        if self._template is None:
            with tempfile.TemporaryDirectory() as temp:
                self.blank_disk(Path(temp))
                vm = await FirecrackerDriver(self.config).boot("template", self.spec, Path(temp), for_template=True)
                try:
                    await vm.link.thaw(new_thaw())
                    await shell(vm.link, "cat /root/* /etc/* > /dev/null 2>&1; sync")
                    await vm.link.freeze(sync=True)
                    self._template = await vm.export_template(self.run_dir / "template")
                finally:
                    await vm.kill()
        return self._template

    def blank_disk(self, directory: Path) -> None:
        """Put a formatted disk into a machine's directory."""
        blank = ensure_blank_disk(self.config.images_dir, self.spec.disk_bytes)
        clone_sparse(blank.path, directory / DISK_NAME)

    def close(self) -> None:
        """Remove the run folder."""
        shutil.rmtree(self.run_dir, ignore_errors=True)


@dataclass
class FirecrackerRig(Rig):
    """A `Rig` over a `FirecrackerHome`."""

    firecracker: FirecrackerHome

    def make_driver(self) -> FirecrackerDriver:
        """Return a new driver object."""
        return FirecrackerDriver(self.firecracker.config)

    async def template(self) -> TemplateRef:
        """Return the process's template."""
        return await self.firecracker.template()

    def make_disk(self, directory: Path) -> None:
        """Put a formatted disk there."""
        self.firecracker.blank_disk(directory)

    async def lose(self, vm: Vm) -> None:
        """Drop the connections."""
        await vm.detach()

    def leftovers(self) -> list[str]:
        """Return processes, run folders and disks that are still there."""
        folder = self.firecracker.run_dir / "m"
        folders = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
        disks = [str(path) for path in (self.home / "machines").glob("*/disk*")]
        return [*machine_processes(self.firecracker.run_dir), *folders, *disks]
