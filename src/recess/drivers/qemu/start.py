"""Starting a VM: a cold boot, a restore over a template, and taking over one that an earlier server started.

A restore does what it can at the same time: the keeper and QEMU start while the disk is filled and the pages are laid
out for the keeper; then the pages are injected, the device state is loaded, and the machine runs. If anything fails,
everything that was begun is ended and removed before the error is raised.

A server that dies in the middle leaves a journal in phase "starting" (or none): `adopt` ends such a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recess.drivers.qemu import disk
from recess.drivers.qemu import keeper as keepers
from recess.drivers.qemu.argv import command, kernel_command_line
from recess.drivers.qemu.bringing import bring_memory
from recess.drivers.qemu.capture import track_disk, undo_interrupted
from recess.drivers.qemu.handles import Handles, Steps, all_of, in_thread, unless_dead
from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.journal import Journal, read_journal, write_journal
from recess.drivers.qemu.keeper import Keeper, end_vm
from recess.drivers.qemu.layout import Layout
from recess.drivers.qemu.linkport import LinkPort
from recess.drivers.qemu.memory import begin_tracking, find_tracking
from recess.drivers.qemu.qmp import Qmp
from recess.drivers.qemu.state import load_state
from recess.errors import Conflict, DriverFailed, InvalidSpec, OutOfSpace, RecessError, Unsupported
from recess.images.disk import clone_sparse
from recess.machines.contract import Fingerprint, PageSet, RestoreParts, TemplateRef, VmSpec

_MONITOR_TIMEOUT_S = 30.0
_ADOPTION_HELLO_S = 30.0  # guestd runs already; QEMU 7.2 takes up to a second to connect again


@dataclass(frozen=True)
class Place:
    """Where and with what a VM is started."""

    layout: Layout
    host: HostFacts
    keeper_binary: Path
    fingerprint: Fingerprint
    hello_timeout_s: float
    page_tracking: str = "auto"  # auto | user | private (memory.py)


def check_spec(spec: VmSpec) -> None:
    """Raise InvalidSpec or Unsupported for what QEMU would refuse or the driver lacks."""
    if spec.memory_bytes % (1 << 20) or spec.memory_bytes < 64 << 20:
        raise InvalidSpec(f"a machine cannot have {spec.memory_bytes} bytes of memory", hint="64M or more, in whole M")
    if not 1 <= spec.cpus <= 32:
        raise InvalidSpec(f"a machine cannot have {spec.cpus} CPUs", hint="1 to 32")
    if spec.disk_bytes % 4096 or spec.disk_bytes <= 0:
        raise InvalidSpec(f"a disk cannot have {spec.disk_bytes} bytes", hint="use a multiple of 4096")
    if spec.network == "full":
        raise Unsupported("the QEMU driver has no network cards yet", hint="use --net broker")


async def boot(place: Place, spec: VmSpec, *, for_template: bool) -> Handles:
    """Cold-boot and wait for guestd's hello."""
    layout, steps = place.layout, Steps()
    _check_boot(layout, spec)
    journal = Journal(
        vm_id=layout.run.name,
        directory=str(layout.directory),
        spec=spec,
        phase="starting",
        ram=str(layout.ram),
        base="boot",
        disk_base=str(layout.disk_base),
        accelerator=place.host.qemu.accelerator,
        shared=True,
        for_template=for_template,
    )
    cmdline = kernel_command_line(spec, place.host.tsc_khz)
    argv = command(place.host.qemu, spec, layout, ram=layout.ram, share=True, boot=cmdline)
    async with _starting(place, journal, keep_disk=True) as begin:
        await in_thread(_prepare_boot, layout, spec)
        steps.mark("prepare")
        vm = await begin(argv)
        steps.mark("start")
        await track_disk(vm.qmp)
        if not for_template:
            vm.tracking = await begin_tracking(vm.keeper, "", mode=place.page_tracking)
            steps.mark("track")
        await _run(vm, steps)
        return _started(vm, steps)


def _check_boot(layout: Layout, spec: VmSpec) -> None:
    try:
        size = layout.disk.stat().st_size
    except FileNotFoundError:
        raise InvalidSpec(f"there is no disk to boot with: {layout.disk}") from None
    if size != spec.disk_bytes:
        raise InvalidSpec(f"the disk {layout.disk} has {size} bytes, not {spec.disk_bytes}")


def _prepare_boot(layout: Layout, spec: VmSpec) -> None:
    free = shutil.disk_usage(layout.run).free
    if free < spec.memory_bytes:
        raise OutOfSpace(
            f"a boot needs {spec.memory_bytes >> 20} MiB in {layout.run.parent}, there are {free >> 20} MiB",
            hint="free some memory, or stop other machines",
        )
    os.close(disk.create_sparse(layout.ram, spec.memory_bytes))
    layout.disk_base.unlink(missing_ok=True)
    layout.disk_delta.unlink(missing_ok=True)
    clone_sparse(layout.disk, layout.disk_base)


async def restore(place: Place, spec: VmSpec, parts: RestoreParts) -> Handles:
    """Bring a VM back: vCPUs running, guestd has said hello, the workload is still frozen."""
    layout, steps = place.layout, Steps()
    template = parts.template
    # Without its own device command QEMU can save a state only of memory that is mapped shared: then each machine has
    # a copy of the template's RAM instead of a private mapping of it.
    own_ram = template is None or not place.host.qemu.devices_command
    ram = layout.ram if template is None or own_ram else template.ram
    if template is None:
        disk_base = layout.disk_base
    else:
        disk_base = template.disk
        _check_template(template.ram, template.disk, spec)
    journal = Journal(
        vm_id=layout.run.name,
        directory=str(layout.directory),
        spec=spec,
        phase="starting",
        ram=str(ram),
        base="boot" if template is None else "template",
        disk_base=str(disk_base),
        accelerator=place.host.qemu.accelerator,
        shared=own_ram,
    )
    argv = command(place.host.qemu, spec, layout, ram=ram, share=own_ram, boot=None)
    async with _starting(place, journal, keep_disk=False) as begin:
        disk_fd, pages_fd = await in_thread(_create_files, layout, spec, journal, template)
        try:
            filling = asyncio.ensure_future(_fill(layout, journal, disk_fd, pages_fd, parts))
            try:
                steps.mark("prepare")
                vm = await begin(argv)
                steps.mark("start")
            except BaseException:
                await asyncio.gather(filling, return_exceptions=True)
                raise
            parts = await filling
            steps.mark("fill")
            async with vm.explain("restore"):
                await bring_memory(vm, parts, pages_fd, mode=place.page_tracking)
        finally:
            os.close(disk_fd)
            os.close(pages_fd)
        steps.mark("memory")
        async with vm.explain("restore"):
            await track_disk(vm.qmp)
            await load_state(vm.qmp, parts.vmstate)
        steps.mark("incoming")
        await _run(vm, steps)
        return _started(vm, steps)


async def _fill(layout: Layout, journal: Journal, disk_fd: int, pages_fd: int, parts: RestoreParts) -> RestoreParts:
    """Fill the disk and lay the pages out for the keeper; return the parts, whole."""
    base = asyncio.ensure_future(in_thread(_fill_base, layout, journal, disk_fd))
    try:
        parts = await parts.whole()
    finally:
        await asyncio.wait([base])
    base.result()
    work = [in_thread(_fill_disk, layout, disk_fd, parts.disk)]
    if parts.mapped is None:
        work.append(in_thread(disk.pack_pages, pages_fd, *disk.as_arrays(parts.memory)))
    await all_of(*work)
    return parts


def _check_template(ram: Path, base_disk: Path, spec: VmSpec) -> None:
    for path, wanted in ((ram, spec.memory_bytes), (base_disk, spec.disk_bytes)):
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DriverFailed(f"the template's file is gone: {path}", log="") from None
        if size != wanted:
            raise InvalidSpec(f"the template's {path.name} has {size} bytes, the machine wants {wanted}")


def _create_files(layout: Layout, spec: VmSpec, journal: Journal, template: TemplateRef | None) -> tuple[int, int]:
    """Make the disk at its full size, so that QEMU can open it while it is filled, and the file for the pages."""
    layout.directory.mkdir(parents=True, exist_ok=True)
    layout.remove_disks()
    if journal.shared:
        fd = disk.create_sparse(layout.ram, spec.memory_bytes)
        with contextlib.closing(os.fdopen(fd, "r+b")):
            if template is not None:
                disk.copy_data(template.ram, fd)
    return disk.create_sparse(layout.disk, spec.disk_bytes), os.memfd_create("recess-inject", os.MFD_CLOEXEC)


def _fill_base(layout: Layout, journal: Journal, target: int) -> None:
    """Write the template's disk."""
    if journal.base == "template":
        disk.copy_data(Path(journal.disk_base), target)
    else:
        os.close(disk.create_sparse(layout.disk_base, journal.spec.disk_bytes))


def _fill_disk(layout: Layout, target: int, blocks: PageSet) -> None:
    """Write the restored blocks, and keep them apart for the captures to come."""
    indices, data = disk.as_arrays(blocks)
    disk.write_pages(target, indices, data)
    if len(indices):
        with layout.disk_delta.open("wb") as handle:
            disk.pack_pages(handle.fileno(), indices, data)


@contextlib.asynccontextmanager
async def _starting(place: Place, journal: Journal, *, keep_disk: bool) -> AsyncIterator[_Begin]:
    """Make the run folder and the link's socket; on any failure end and remove all that was made since."""
    layout = place.layout
    try:
        layout.run.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise Conflict(f"a VM {layout.run.name} is there already") from None
    except OSError as exc:
        raise DriverFailed(f"the run folder cannot be made: {exc}", log="") from exc
    begin = _Begin(place, journal)
    try:
        write_journal(layout, journal)
        begin.port = LinkPort.open(layout, hello_timeout_s=place.hello_timeout_s)
        yield begin
    except BaseException as exc:
        await asyncio.shield(begin.undo(keep_disk=keep_disk))
        if isinstance(exc, OSError):
            raise DriverFailed(f"the VM could not be started: {exc}", log="") from exc
        raise


class _Begin:
    """Starts the keeper and QEMU; knows how far it got."""

    def __init__(self, place: Place, journal: Journal) -> None:
        self.place = place
        self.journal = journal
        self.port: LinkPort | None = None
        self._keeper: Keeper | None = None
        self._qmp: Qmp | None = None

    async def __call__(self, argv: Sequence[str]) -> Handles:
        place, layout = self.place, self.place.layout
        if self.port is None:
            raise DriverFailed("the link's socket was not opened", log="")
        await in_thread(keepers.launch, place.keeper_binary, layout, Path(self.journal.ram), argv)
        self._keeper = keeper = Keeper.connect(layout)
        self._qmp = await unless_dead(keeper, "start", Qmp.connect(layout.run, timeout_s=_MONITOR_TIMEOUT_S))
        return Handles(layout, self.journal, place.host, place.fingerprint, self.port, keeper, self._qmp)

    async def undo(self, *, keep_disk: bool) -> None:
        layout = self.place.layout
        await end_vm(layout, self._keeper)
        if self.port is not None:
            await self.port.close()
        if self._qmp is not None:
            await self._qmp.close()
        if self._keeper is not None:
            self._keeper.close()
        if keep_disk:
            layout.disk_base.unlink(missing_ok=True)
        else:
            layout.remove_disks()


async def _run(vm: Handles, steps: Steps) -> None:
    vm.port.start()
    async with vm.explain("start"):
        await vm.qmp.execute("cont")
    steps.mark("cont")
    await unless_dead(vm.keeper, "start", vm.port.wait_connected())
    steps.mark("hello")


def _started(vm: Handles, steps: Steps) -> Handles:
    vm.journal = dataclasses.replace(vm.journal, phase="running")
    write_journal(vm.layout, vm.journal)
    vm.timings_s = {**steps.timings_s, "total": steps.total()}
    return vm


async def adopt(place: Place) -> Handles | None:
    """Take over the VM of this layout, or end what is left of it and return None."""
    layout = place.layout
    journal = read_journal(layout)
    keeper: Keeper | None = None
    begin = _Begin(place, journal) if journal is not None else None
    try:
        if begin is None or journal is None or journal.phase != "running":
            raise DriverFailed("nothing that can be taken over", log="")
        begin._keeper = keeper = Keeper.connect(layout)
        begin.port = LinkPort.open(layout, hello_timeout_s=min(place.hello_timeout_s, _ADOPTION_HELLO_S))
        begin._qmp = await unless_dead(keeper, "adoption", Qmp.connect(layout.run, timeout_s=_MONITOR_TIMEOUT_S))
        vm = Handles(layout, journal, place.host, place.fingerprint, begin.port, keeper, begin._qmp)
        vm.tracking = await find_tracking(keeper)
        await undo_interrupted(vm)
        if await vm.running():
            begin.port.start()
            await unless_dead(keeper, "adoption", begin.port.wait_connected())
        return vm
    except RecessError:
        if begin is not None:
            await begin.undo(keep_disk=True)
        else:
            await end_vm(layout, keeper)
        return None
