"""What tests need to run real gVisor machines: a home with the shared images, and one template a test process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from recess.config import Config, load_config
from recess.drivers.gvisor import GvisorDriver
from recess.drivers.gvisor.runsc import find_runsc
from recess.drivers.kept.keeper import last_words
from recess.errors import MissingTool, RecessError
from recess.machines.contract import DISK_NAME, TemplateRef, Vm, VmSpec
from recess.testing.driver_suite import Rig, new_thaw, shell
from recess.testing.qemu_rig import spec_of


def has_runsc() -> bool:
    """Tell whether there is a runsc to test with."""
    try:
        find_runsc(load_config())
    except MissingTool:
        return False
    return True


def machine_processes(run_dir: Path) -> list[str]:
    """Return the command lines of keepers, runtimes, machines and gofers of this run folder, from /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and str(run_dir) in (text := (folder / "cmdline").read_text()):
                words = text.split("\0")
                if "keeper" in words[0] or "runsc" in words[0]:
                    found.append(" ".join(words)[:100])
    return found


class GvisorHome:
    """One per test process: a run folder, a home whose images are the shared ones, and the template to fork from."""

    def __init__(self, images_dir: Path) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="recess-gv-", dir="/dev/shm"))
        home = self.run_dir / "home"
        home.mkdir()
        (home / "images").symlink_to(images_dir)
        self.config: Config = load_config(
            home=str(home), run_dir=str(self.run_dir), runsc_bin=str(find_runsc(load_config()))
        )
        self.spec: VmSpec = spec_of(self.config)
        self._template: TemplateRef | None = None

    @staticmethod
    @functools.cache
    def shared(images_dir: Path) -> GvisorHome:
        """Return this process's; its folder goes when the process ends."""
        home = GvisorHome(images_dir)
        atexit.register(home.close)
        return home

    async def template(self) -> TemplateRef:
        """Return the process's template; starts it on first use."""
        if self._template is None:
            with tempfile.TemporaryDirectory() as temp:
                self.blank_disk(Path(temp))
                vm = await GvisorDriver(self.config).boot("template", self.spec, Path(temp), for_template=True)
                try:
                    await vm.link.thaw(new_thaw())
                    await shell(vm.link, "true")
                    await vm.link.freeze(sync=True)
                    self._template = await vm.export_template(self.run_dir / "template")
                except RecessError as exc:
                    end = await last_words(vm._handles.keeper)
                    exc.add_note("its machine lives" if end is None else f"its machine ended: {end.line()}\n{end.log}")
                    raise
                finally:
                    await vm.kill()
        return self._template

    def blank_disk(self, directory: Path) -> None:
        """Put an empty disk into a machine's directory: the driver keeps files in memory."""
        with (directory / DISK_NAME).open("wb") as disk:
            disk.truncate(self.spec.disk_bytes)

    def close(self) -> None:
        """Remove the run folder."""
        shutil.rmtree(self.run_dir, ignore_errors=True)


@dataclass
class GvisorRig(Rig):
    """A `Rig` over a `GvisorHome`."""

    gvisor: GvisorHome

    def make_driver(self) -> GvisorDriver:
        """Return a new driver object."""
        return GvisorDriver(self.gvisor.config)

    async def template(self) -> TemplateRef:
        """Return the process's template."""
        return await self.gvisor.template()

    def make_disk(self, directory: Path) -> None:
        """Put a disk there."""
        self.gvisor.blank_disk(directory)

    async def lose(self, vm: Vm) -> None:
        """Drop the connections."""
        await vm.detach()

    def leftovers(self) -> list[str]:
        """Return processes, run folders and disks that are still there."""
        folder = self.gvisor.run_dir / "m"
        folders = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
        disks = [str(path) for path in (self.home / "machines").glob("*/disk*")]
        return [*machine_processes(self.gvisor.run_dir), *folders, *disks]
