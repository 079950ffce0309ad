"""Starting a VM: a cold boot, a restore from a snapshot, and taking over one that an earlier server started.

Each VM has a working folder of its own (the run folder), in which `root`, `disk`, `kernel` and `initrd` are links to its
files: the device state of a snapshot names them, and means another machine's in another folder.

A restore starts keeper and Firecracker while the disk is filled and the memory laid out: a fork without pages of its own is
mapped over the template's file, which all forks share; one with pages gets a file of its own (`ram`, in shared memory); and
where the caller wants its memory to come while it runs, a pager answers Firecracker's page faults (faults.py).

If anything fails, everything that was begun is ended and removed before the error is raised. A server that dies in the
middle leaves a journal in phase "starting" (or none): `adopt` ends such a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recess.drivers.firecracker import calls
from recess.drivers.firecracker.api import Api
from recess.drivers.firecracker.capture import undo_interrupted
from recess.drivers.firecracker.faults import FaultSocket, may_catch_faults, serve_faults
from recess.drivers.firecracker.handles import Handles, end_machine, running
from recess.drivers.firecracker.host import HostFacts, command
from recess.drivers.firecracker.jail import Jail, descendants, holds_devices, jail_of, prepare
from recess.drivers.firecracker.jail import command as jail_command
from recess.drivers.firecracker.journal import Journal, write_journal
from recess.drivers.firecracker.ledger import Ledger, read_ledger, write_ledger
from recess.drivers.firecracker.port import Port
from recess.drivers.kept import disk
from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.cgroup import Groups, Limits
from recess.drivers.kept.keeper import Keeper, read_pids
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import Steps, all_of, in_thread, unless_dead
from recess.errors import Conflict, DriverFailed, InvalidSpec, MissingTool, RecessError, Unsupported
from recess.images.cpio import read_file
from recess.images.files import space_errors
from recess.machines.contract import Fingerprint, PageSet, RestoreParts, TemplateRef, VmSpec
from recess.units import MIB

CPUS_MAX = 32
_API_S = 30.0
_ADOPTION_HELLO_S = 30.0  # guestd runs already


@dataclass(frozen=True)
class Place:
    """Where and with what a VM is started."""

    layout: Layout
    host: HostFacts
    fingerprint: Fingerprint
    hello_timeout_s: float
    limited: bool = True  # the VM gets a control group where there may be one (cgroup.py)


def limits_of(spec: VmSpec) -> Limits:
    """Return what a VM's processes may take of the host together. Its memory counts twice: Firecracker writes a snapshot's
    pages into shared memory, and the kernel books them on the same group."""
    return Limits.of(spec, spec.memory_bytes)


def check_spec(spec: VmSpec) -> None:
    """Raise InvalidSpec or Unsupported for what Firecracker would refuse or the driver lacks."""
    if spec.memory_bytes % MIB or spec.memory_bytes < 64 * MIB:
        raise InvalidSpec(f"a machine cannot have {spec.memory_bytes} bytes of memory", hint="64M or more, in whole M")
    if not 1 <= spec.cpus <= CPUS_MAX:
        raise InvalidSpec(f"a machine cannot have {spec.cpus} CPUs", hint=f"1 to {CPUS_MAX}")
    if spec.disk_bytes % 4096 or spec.disk_bytes <= 0:
        raise InvalidSpec(f"a disk cannot have {spec.disk_bytes} bytes", hint="use a multiple of 4096")
    if spec.network == "full":
        raise Unsupported("the Firecracker driver has no network cards yet", hint="use --net broker")


async def boot(place: Place, spec: VmSpec, *, for_template: bool) -> Handles:
    """Cold-boot and wait for guestd's hello."""
    layout, steps = place.layout, Steps()
    _check_disk(layout.disk, spec.disk_bytes)
    await in_thread(check_channel, spec.boot.initrd)
    journal = Journal(
        layout.run.name, str(layout.directory), spec, "starting", for_template=for_template, jailed=_jailed(place)
    )
    async with _starting(place, journal, keep_disk=True) as begin:
        vm = await begin(Ledger())
        steps.mark("start")
        async with vm.explain("start"):
            for call in calls.boot_calls(spec):
                await vm.api.call(call)
        steps.mark("boot")
        return await _greet(vm, steps)


def _jailed(place: Place) -> str:
    """Return the binary that is to run in a jail, "" for a VM without one."""
    place.layout.directory.mkdir(parents=True, exist_ok=True)
    jailed = not place.host.no_jail and holds_devices(place.layout.directory)
    return str(place.host.binary) if jailed else ""


def _check_disk(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise InvalidSpec(f"there is no disk to boot with: {path}") from None
    if found != size:
        raise InvalidSpec(f"the disk {path} has {found} bytes, not {size}")


def check_channel(initrd: Path) -> None:
    """Raise MissingTool for an initial root whose kernel's modules lack the guest channel's. One without modules is of a
    kernel that has all built in."""
    order = read_file(initrd.read_bytes(), "modules/order")
    if order.strip() and b"vmw_vsock_virtio_transport" not in order:
        raise MissingTool(
            "this home keeps its guest kernel without the vsock modules, which it was fetched before they were wanted",
            hint="remove images/kernel/current.json in the home, then run tools/setup.sh",
        )


def _files(journal: Journal) -> dict[str, Path]:
    """Return what Firecracker opens, by its names for it, but the disk, which it may also write."""
    boot = journal.spec.boot
    files = {calls.ROOT_FILE: boot.root, calls.KERNEL_FILE: boot.kernel, calls.INITRD_FILE: boot.initrd}
    if journal.ram_base is not None:
        files[calls.TEMPLATE_FILE] = journal.ram_base
    return {name: path.absolute() for name, path in files.items()}


def _lay_out(layout: Layout, journal: Journal, jail: Jail | None) -> None:
    """Put the files where Firecracker finds them: links in the run folder, or what the jail is made of."""
    files = _files(journal)
    if jail is not None:
        prepare(jail, layout.run / calls.SHM, files, layout.disk)
        return
    for name, path in {**files, calls.DISK_FILE: layout.disk}.items():
        (layout.run / name).symlink_to(path)


async def restore(place: Place, spec: VmSpec, parts: RestoreParts) -> Handles:
    """Bring a VM back: vCPUs running, guestd has said hello, the workload is still frozen."""
    layout, steps, template = place.layout, Steps(), parts.template
    if template is not None:
        _check_template(template, spec)
    journal = Journal(
        layout.run.name,
        str(layout.directory),
        spec,
        "starting",
        template_ram="" if template is None else str(template.ram),
        template_disk="" if template is None else str(template.disk),
        jailed=_jailed(place),
    )
    async with _starting(place, journal, keep_disk=False) as begin:
        parts = await _without_faults(parts, jailed=bool(journal.jailed))
        ledger = Ledger(parts.snapshot, over=_numbers(parts.memory), whole=parts.lazy is None)
        filling = asyncio.ensure_future(_fill(layout, spec, parts))
        try:
            if begin.jail is not None:  # a file must be there to be mounted
                await asyncio.shield(filling)
            vm = await begin(ledger)
        finally:
            await asyncio.wait([filling])
        filling.result()
        vm.memory = parts.choice or "inject: it was at hand"
        vm.lazy = parts.lazy
        steps.mark("start")
        async with vm.explain("restore"):
            await _load(vm, parts)
            steps.mark("load")
            await vm.api.call(calls.resume())
        return await _greet(vm, steps)


def _numbers(pages: PageSet) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.frombuffer(pages.indices, "<u4").astype(np.uint32)


def _check_template(template: TemplateRef, spec: VmSpec) -> None:
    for path, wanted in ((template.ram, spec.memory_bytes), (template.disk, spec.disk_bytes)):
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DriverFailed(f"the template's file is gone: {path}", log="") from None
        if size != wanted:
            raise InvalidSpec(f"the template's {path.name} has {size} bytes, the machine wants {wanted}")


async def _without_faults(parts: RestoreParts, *, jailed: bool) -> RestoreParts:
    """Return the parts with all memory at hand where this user may not have it brought by page faults."""
    if parts.lazy is None or may_catch_faults(root=os.geteuid() == 0, jailed=jailed):
        return parts
    pages = await parts.lazy.read_all()
    await parts.lazy.close()
    return dataclasses.replace(parts, memory=pages, lazy=None, choice="inject: this user may not catch page faults")


async def _fill(layout: Layout, spec: VmSpec, parts: RestoreParts) -> None:
    await all_of(in_thread(_fill_disk, layout, spec, parts), in_thread(_fill_memory, layout, spec, parts))


def _fill_disk(layout: Layout, spec: VmSpec, parts: RestoreParts) -> None:
    layout.directory.mkdir(parents=True, exist_ok=True)
    layout.remove_disks()
    fd = disk.create_sparse(layout.disk, spec.disk_bytes)
    try:
        if parts.template is not None:
            disk.copy_data(parts.template.disk, fd)
        disk.write_pages(fd, *disk.as_arrays(parts.disk))
    finally:
        os.close(fd)


def _fill_memory(layout: Layout, spec: VmSpec, parts: RestoreParts) -> None:
    """Write the device state, and the memory if it is another than the template's."""
    with space_errors("device state"):
        (layout.run / calls.STATE_FILE).write_bytes(parts.vmstate)
    if parts.lazy is not None or (parts.template is not None and parts.memory.count == 0):
        return
    fd = disk.create_sparse(layout.run / calls.RAM_FILE, spec.memory_bytes)
    try:
        if parts.template is not None:
            disk.copy_data(parts.template.ram, fd)
        disk.write_pages(fd, *disk.as_arrays(parts.memory))
    finally:
        os.close(fd)


async def _load(vm: Handles, parts: RestoreParts) -> None:
    """Have Firecracker load the snapshot, its memory from a file or by page faults. Its device state is read meanwhile, so
    faults are answered before the call is."""
    if parts.lazy is None:
        ram = calls.RAM_FILE if (vm.layout.run / calls.RAM_FILE).exists() else calls.TEMPLATE_FILE
        await vm.api.call(calls.load_snapshot(calls.STATE_FILE, calls.FILE, ram))
        return
    sock = FaultSocket.open(_work(vm.layout, vm.jail), None if vm.jail is None else vm.jail.uid)
    serving = None
    try:
        os.close(await parts.lazy.ranges())  # opened: all of it is absent here, whatever differs from the template
        vmm = descendants(read_pids(vm.layout)["vmm"].pid)
        serving = asyncio.ensure_future(serve_faults(sock, vm.keeper, vmm, vm.journal.spec.memory_bytes, parts.lazy))
        loading = asyncio.ensure_future(
            vm.api.call(calls.load_snapshot(calls.STATE_FILE, calls.UFFD, calls.FAULT_SOCKET))
        )
        try:
            # Whichever fails first ends the wait: without a pager the load never returns.
            done, _ = await asyncio.wait([serving, loading], return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in (serving, loading):
                task.cancel()
            await asyncio.gather(serving, loading, return_exceptions=True)
    finally:
        sock.close()


@contextlib.asynccontextmanager
async def _starting(place: Place, journal: Journal, *, keep_disk: bool) -> AsyncIterator[_Begin]:
    """Make the run folder; on any failure end and remove all that was made since."""
    layout = place.layout
    try:
        layout.run.mkdir(parents=True, mode=0o700)
        (layout.run / calls.SHM).mkdir(mode=0o700)
    except FileExistsError:
        raise Conflict(f"a VM {layout.run.name} is there already") from None
    except OSError as exc:
        raise DriverFailed(f"the run folder cannot be made: {exc}", log="") from exc
    begin = _Begin(place, journal)
    try:
        write_journal(layout, journal)
        yield begin
    except BaseException as exc:
        await asyncio.shield(begin.undo(keep_disk=keep_disk))
        if isinstance(exc, OSError):
            raise DriverFailed(f"the VM could not be started: {exc}", log="") from exc
        raise


class _Begin:
    """Starts the keeper and Firecracker; knows how far it got."""

    def __init__(self, place: Place, journal: Journal) -> None:
        self.place = place
        self.journal = journal
        self.jail = jail_of(Path(journal.jailed), place.layout) if journal.jailed else None
        self._keeper: Keeper | None = None
        self._port: Port | None = None

    async def __call__(self, ledger: Ledger) -> Handles:
        place, layout, jail = self.place, self.place.layout, self.jail
        write_ledger(layout.run, ledger)
        await in_thread(_lay_out, layout, self.journal, jail)
        argv = command(place.host.binary)
        if jail is not None:
            files = {**_files(self.journal), calls.DISK_FILE: layout.disk}
            argv = jail_command(jail, place.host.keeper, layout.run / calls.SHM, files)
        group = await self._group()
        # The keeper is told of a file that is there: it copies no memory here, Firecracker does.
        await in_thread(keepers.launch, place.host.keeper, layout, layout.journal, argv, group=group)
        vm = self.handles(ledger, place.hello_timeout_s)
        await unless_dead(vm.keeper, "start", vm.api.wait_ready(_API_S))
        return vm

    async def _group(self) -> Path | None:
        """Make the VM's control group and note it. One that is made and in no journal is empty, and swept by a later server."""
        if not self.place.limited:
            return None
        group = await in_thread(lambda: Groups.find().make(limits_of(self.journal.spec)))
        if group is not None:
            self.journal = dataclasses.replace(self.journal, group=str(group))
            write_journal(self.place.layout, self.journal)
        return group

    def handles(self, ledger: Ledger, hello_timeout_s: float) -> Handles:
        """Connect to the keeper, which runs. Raises DriverFailed."""
        place, layout = self.place, self.place.layout
        work = _work(layout, self.jail)
        self._keeper = keeper = Keeper.connect(layout)
        self._port = port = Port(work, hello_timeout_s=hello_timeout_s)
        fingerprint = self.journal.fingerprint or place.fingerprint
        return Handles(layout, self.journal, place.host, fingerprint, keeper, Api(work), port, ledger, jail=self.jail)

    async def undo(self, *, keep_disk: bool) -> None:
        layout = self.place.layout
        await end_machine(layout, self._keeper, self.jail, self.journal.group)
        if self._port is not None:
            await self._port.close()
        if self._keeper is not None:
            self._keeper.close()
        if not keep_disk:
            layout.remove_disks()


def _work(layout: Layout, jail: Jail | None) -> Path:
    """Return the VMM's working folder, where its sockets are."""
    return layout.run if jail is None else jail.root


async def _greet(vm: Handles, steps: Steps) -> Handles:
    """Wait for guestd; the VM counts as started from here on."""
    steps.mark("resume")
    await unless_dead(vm.keeper, "start", vm.port.attach())
    steps.mark("hello")
    vm.journal = dataclasses.replace(vm.journal, phase="running", fingerprint=vm.fingerprint)
    write_journal(vm.layout, vm.journal)
    vm.timings_s = {**steps.timings_s, "total": steps.total()}
    return vm


async def adopt(place: Place, journal: Journal) -> Handles | None:
    """Take over the VM of this layout, or end what is left of it and return None."""
    begin = _Begin(place, journal)
    try:
        if journal.phase != "running":
            raise DriverFailed("it was not started to its end", log="")
        vm = begin.handles(read_ledger(place.layout.run), min(place.hello_timeout_s, _ADOPTION_HELLO_S))
        vm.memory = "an earlier server started it so"
        await unless_dead(vm.keeper, "adoption", undo_interrupted(vm))
        if await running(vm):
            await unless_dead(vm.keeper, "adoption", vm.port.attach())
        return vm
    except RecessError:
        await begin.undo(keep_disk=True)
        return None
