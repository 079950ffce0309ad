"""Starting a VM: a cold boot, a restore over a template, and taking over one that an earlier server started.

A restore takes a VM that waits, if the pool has one. Else it does what it can at the same time: the keeper and QEMU start
while the disk is filled and the pages are laid out for the keeper. Then the memory is brought, the device state is
loaded, and the machine runs. If anything fails, everything that was begun is ended and removed before the error is raised.

A server that dies in the middle leaves a journal in phase "starting" (or none): `adopt` ends such a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recess.drivers.kept import disk
from recess.drivers.kept.cgroup import Limits
from recess.drivers.kept.keeper import end_vm
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import Steps, all_of, in_thread, unless_dead
from recess.drivers.qemu.argv import cache_mib, command, kernel_command_line
from recess.drivers.qemu.begun import Begun
from recess.drivers.qemu.blocks import track_disk
from recess.drivers.qemu.bringing import bring_memory
from recess.drivers.qemu.capture import undo_interrupted
from recess.drivers.qemu.card import PUBLIC, card_of
from recess.drivers.qemu.handles import Handles
from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.journal import Journal, read_journal, write_journal
from recess.drivers.qemu.memory import begin_tracking, find_tracking
from recess.drivers.qemu.pool import WarmPool
from recess.drivers.qemu.pool_member import Member, order_for
from recess.drivers.qemu.state import load_state
from recess.errors import Conflict, DriverFailed, InvalidSpec, OutOfSpace, RecessError
from recess.guestlink.link import WakeUp
from recess.images.disk import clone_sparse
from recess.machines.contract import Fingerprint, PageSet, RestoreParts, TemplateRef, VmSpec
from recess.units import MIB

_ADOPTION_HELLO_S = 30.0  # guestd runs already; QEMU 7.2 takes up to a second to connect again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where and with what a VM is started."""

    layout: Layout
    host: HostFacts
    keeper_binary: Path
    fingerprint: Fingerprint
    hello_timeout_s: float
    page_tracking: str = "auto"  # auto | user | private (memory.py)
    cards: str = PUBLIC  # public | open | off: what a machine's network card may reach (card.py)
    limited: bool = True  # the VMM gets a control group where there may be one (cgroup.py)

    def card(self, spec: VmSpec) -> str:
        """Return which network card a VM gets here. Raises as `card_of`."""
        return card_of(spec, self.cards, able=self.host.qemu.cards)

    def limits(self, spec: VmSpec) -> Limits | None:
        """Return what the VMM may take of the host."""
        return Limits.of(spec, cache_mib(self.host.qemu, spec) * MIB) if self.limited else None


def check_spec(spec: VmSpec) -> None:
    """Raise InvalidSpec for what QEMU would refuse."""
    if spec.memory_bytes % (1 << 20) or spec.memory_bytes < 64 << 20:
        raise InvalidSpec(f"a machine cannot have {spec.memory_bytes} bytes of memory", hint="64M or more, in whole M")
    if not 1 <= spec.cpus <= 32:
        raise InvalidSpec(f"a machine cannot have {spec.cpus} CPUs", hint="1 to 32")
    if spec.disk_bytes % 4096 or spec.disk_bytes <= 0:
        raise InvalidSpec(f"a disk cannot have {spec.disk_bytes} bytes", hint="use a multiple of 4096")


async def boot(place: Place, spec: VmSpec, *, for_template: bool) -> Handles:
    """Cold-boot and wait for guestd's hello."""
    layout, steps, card = place.layout, Steps(), place.card(spec)
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
    argv = command(place.host.qemu, spec, layout, ram=layout.ram, share=True, boot=cmdline, card=card)
    async with _starting(place, journal, keep_disk=True) as begin:
        begin.note()
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
            hint="free some memory, stop other machines, or set RECESS_RUN_DIR to a folder with more room",
        )
    os.close(disk.create_sparse(layout.ram, spec.memory_bytes))
    layout.disk_base.unlink(missing_ok=True)
    layout.disk_delta.unlink(missing_ok=True)
    clone_sparse(layout.disk, layout.disk_base)


async def restore(place: Place, spec: VmSpec, parts: RestoreParts, pool: WarmPool) -> Handles:
    """Bring a VM back: vCPUs running, guestd has said hello, the workload is still frozen unless `parts.wake` was sent."""
    layout, template = place.layout, parts.template
    card = place.card(spec)
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
    order = None
    if template is not None and not own_ram and not card:  # none waits with a card: few want one
        order = order_for(
            layout, spec, template, place.host, place.keeper_binary, place.hello_timeout_s, place.limits(spec)
        )
    steps = Steps()
    with pool.under_way(order):
        async with _starting(place, journal, keep_disk=False) as begin:
            if not await begin.take(pool.take(order)):
                begin.note()
            steps.mark("take")
            return await _bring_up(begin, parts, steps)


async def _bring_up(begin: _Begin, parts: RestoreParts, steps: Steps) -> Handles:
    """Restore over a VM that has waited, or start one."""
    place, journal, wake = begin.place, begin.journal, parts.wake
    layout, spec = place.layout, journal.spec
    card = place.card(spec)
    disk_fd, pages_fd = await in_thread(_create_files, layout, journal, parts.template, begin.member)
    try:
        filling = asyncio.ensure_future(_fill(layout, journal, disk_fd, pages_fd, parts, begin.member is None))
        try:
            steps.mark("prepare")
            if begin.member is None:
                ram = Path(journal.ram)
                await begin(command(place.host.qemu, spec, layout, ram=ram, share=journal.shared, boot=None, card=card))
            vm = begin.handles()
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
        if begin.member is None:
            await track_disk(vm.qmp)
        await load_state(vm.qmp, parts.vmstate)
    steps.mark("incoming")
    await _run(vm, steps, wake)
    _started(vm, steps)
    begin.untie()
    return vm


async def _fill(
    layout: Layout, journal: Journal, disk_fd: int, pages_fd: int, parts: RestoreParts, empty: bool
) -> RestoreParts:
    """Fill the disk (its base only if it is `empty`) and lay the pages out for the keeper; return the parts, whole."""
    if empty:
        base = asyncio.ensure_future(in_thread(_fill_base, layout, journal, disk_fd))
        try:
            parts = await parts.whole()
        finally:
            await asyncio.wait([base])
        base.result()
    else:
        parts = await parts.whole()
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


def _create_files(
    layout: Layout, journal: Journal, template: TemplateRef | None, member: Member | None
) -> tuple[int, int]:
    """Make the disk at its full size, so that QEMU can open it while it is filled, and the file for the pages. A VM that
    has waited has its disk already, with the template's content."""
    spec = journal.spec
    if member is not None:
        return member.take_disk(), os.memfd_create("recess-inject", os.MFD_CLOEXEC)
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
    """Claim the run folder, by making it; on any failure end and remove all that was made since."""
    layout = place.layout
    try:
        layout.run.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise Conflict(f"a VM {layout.run.name} is there already") from None
    except OSError as exc:
        raise DriverFailed(f"the run folder cannot be made: {exc}", log="") from exc
    begin = _Begin(place, journal)
    try:
        yield begin
    except BaseException as exc:
        await asyncio.shield(begin.undo(keep_disk=keep_disk))
        if isinstance(exc, OSError):
            raise DriverFailed(f"the VM could not be started: {exc}", log="") from exc
        raise


class _Begin:
    """Starts the keeper and QEMU, or takes those that waited; knows how far it got."""

    def __init__(self, place: Place, journal: Journal) -> None:
        self.place = place
        self.journal = journal
        self.begun = Begun(place.layout)
        self.member: Member | None = None

    def note(self) -> None:
        """Write the journal and open the link's socket."""
        write_journal(self.place.layout, self.journal)
        self.begun.listen(self.place.hello_timeout_s)

    async def take(self, member: Member | None) -> bool:
        """Go on with a VM that waited; False if there is none, or it turns out to be of no use: then it is ended."""
        if member is None:
            return False
        layout = self.place.layout
        try:
            await member.become(layout, self.journal)
        except BaseException as exc:
            await asyncio.shield(member.end())
            if not isinstance(exc, RecessError | OSError):
                raise
            log.warning("VM %s is started anew, the one that waited for it is of no use: %s", layout.run.name, exc)
            layout.run.mkdir(mode=0o700, exist_ok=True)  # it may have gone with that one
            return False
        self.begun, self.member = member.begun, member
        return True

    async def __call__(self, argv: Sequence[str]) -> Handles:
        place, journal = self.place, self.journal
        limits = place.limits(journal.spec)
        filtered = place.card(journal.spec) == PUBLIC
        await self.begun.start(place.keeper_binary, Path(journal.ram), argv, limits=limits, filtered=filtered)
        return self.handles()

    def handles(self) -> Handles:
        """Return what the driver holds of the VM, which runs as a process now."""
        place = self.place
        port, keeper, qmp = self.begun.whole()
        fingerprint = self.journal.fingerprint or place.fingerprint
        vm = Handles(place.layout, self.journal, place.host, fingerprint, port, keeper, qmp)
        vm.start = "it was started for this" if self.member is None else "it waited in the warm pool"
        return vm

    def untie(self) -> None:
        """The VM lives on without this server from now on: its journal says that it runs."""
        if self.member is not None:
            self.member.untie()

    async def undo(self, *, keep_disk: bool) -> None:
        await self.begun.undo(keep_disk=keep_disk)
        if self.member is not None:
            self.member.let_go()


async def _run(vm: Handles, steps: Steps, wake: WakeUp | None = None) -> None:
    vm.port.start(wake)
    async with vm.explain("start"):
        await vm.qmp.execute("cont")
    steps.mark("cont")
    console = functools.partial(vm.layout.console_tail, 4096)
    await unless_dead(vm.keeper, "start", vm.port.wait_connected(), console=console)
    steps.mark("hello")


def _started(vm: Handles, steps: Steps) -> Handles:
    vm.journal = dataclasses.replace(vm.journal, phase="running", fingerprint=vm.fingerprint)
    write_journal(vm.layout, vm.journal)
    vm.timings_s = {**steps.timings_s, "total": steps.total()}
    return vm


async def adopt(place: Place) -> Handles | None:
    """Take over the VM of this layout, or end what is left of it and return None."""
    layout = place.layout
    journal = read_journal(layout)
    begin = _Begin(place, journal) if journal is not None else None
    try:
        if begin is None or journal is None or journal.phase != "running":
            raise DriverFailed("nothing that can be taken over", log="")
        begin.begun.listen(min(place.hello_timeout_s, _ADOPTION_HELLO_S))
        await begin.begun.find("adoption")
        vm = begin.handles()
        vm.start = "an earlier server started it"
        vm.tracking = await find_tracking(vm.keeper)
        await undo_interrupted(vm)
        if await vm.running():
            vm.port.start()
            await unless_dead(vm.keeper, "adoption", vm.port.wait_connected())
        return vm
    except RecessError:
        if begin is not None:
            await begin.undo(keep_disk=True)
        else:
            await end_vm(layout, None)
        return None
