"""Starting a machine: a first start, a restore, and taking over one that an earlier server started.

If anything fails, everything that was begun is ended and removed before the error is raised. A server that dies in the
middle leaves a journal in phase "starting" (or none): `adopt` ends such a machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from recess.drivers.gvisor import bundle, pages
from recess.drivers.gvisor import journal as paths
from recess.drivers.gvisor import runsc as runsc_cli
from recess.drivers.gvisor.handles import (
    Handles,
    end_machine,
    map_ram,
    processes,
    relay_starter,
)
from recess.drivers.gvisor.journal import Journal, read_journal, write_journal
from recess.drivers.gvisor.pages import Known
from recess.drivers.gvisor.port import Port
from recess.drivers.gvisor.runsc import CONTAINER, PAUSED, RUNNING, Runsc
from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.cgroup import Groups, Limits
from recess.drivers.kept.keeper import Keeper
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import in_thread, unless_dead
from recess.errors import Conflict, DriverFailed, InvalidSpec, RecessError, Timeout, Unsupported
from recess.images.cpio import read_file
from recess.images.files import space_errors
from recess.machines.contract import Fingerprint, RestoreParts, VmSpec
from recess.units import PAGE_BYTES

_START_TIMEOUT_S = 60.0
_HELLO_TIMEOUT_S = 30.0
# Of the host's: gVisor has one for every process inside, and threads for what these wait for. Far more than any machine had
# in the tests; a fork bomb ends its machine, not the host.
_PROCESSES = 8192


@dataclass(frozen=True)
class Place:
    """Where and with what a machine is started."""

    layout: Layout
    runsc: Runsc
    keeper_binary: Path
    fingerprint: Fingerprint
    limited: bool = True  # the machine gets a control group where there may be one (cgroup.py)


def check_spec(spec: VmSpec) -> None:
    """Raise InvalidSpec or Unsupported for what the driver lacks."""
    if spec.memory_bytes % PAGE_BYTES or spec.memory_bytes <= 0:
        raise InvalidSpec(f"a machine cannot have {spec.memory_bytes} bytes of memory", hint="whole 4 KiB pages")
    if spec.disk_bytes % PAGE_BYTES or spec.disk_bytes <= 0:
        raise InvalidSpec(f"a disk cannot have {spec.disk_bytes} bytes", hint="use a multiple of 4096")
    if spec.network == "full":
        raise Unsupported("the gVisor driver has no network cards", hint="use --net broker")


def limits_of(spec: VmSpec) -> Limits:
    """Return what a machine's processes may take of the host together. Its memory counts twice: while a snapshot is taken,
    gVisor writes the image into shared memory, and the kernel books that on the same group."""
    return Limits.of(spec, spec.memory_bytes, _PROCESSES)


def cores_for(vm_id: str, cpus: int) -> list[int]:
    """Return the host's processors that a machine runs on, [] for all. gVisor gives its programs as many as it may use
    itself, and nothing else bounds them here; which ones is spread by the machine's id."""
    cores = sorted(os.sched_getaffinity(0))
    if cpus >= len(cores):
        return []
    first = zlib.crc32(vm_id.encode()) % len(cores)
    return sorted((cores + cores)[first : first + cpus])


async def boot(place: Place, spec: VmSpec, *, for_template: bool) -> Handles:
    """Start a fresh machine and wait for guestd's hello. One that is restored may find fewer processors than it had."""
    if spec.cpus > (have := len(os.sched_getaffinity(0))):
        raise InvalidSpec(f"a gVisor machine cannot have {spec.cpus} CPUs: this host has {have}", hint=f"--cpus {have}")
    layout = place.layout
    try:
        size = layout.disk.stat().st_size
    except FileNotFoundError:
        raise InvalidSpec(f"there is no disk to boot with: {layout.disk}") from None
    if size != spec.disk_bytes:
        raise InvalidSpec(f"the disk {layout.disk} has {size} bytes, not {spec.disk_bytes}")
    journal = Journal(spec=spec, phase="starting", template_ram="", for_template=for_template)
    async with _starting(place, journal, keep_disk=True):
        guestd = await in_thread(_guestd, spec.boot.initrd)
        (paths.init(layout) / "guestd").write_bytes(guestd)
        (paths.init(layout) / "guestd").chmod(0o755)
        return await _run(place, journal, ["run", f"--bundle={paths.bundle(layout)}", CONTAINER], Known())


def _guestd(initrd: Path) -> bytes:
    try:
        return read_file(initrd.read_bytes(), "init")
    except OSError as exc:
        raise DriverFailed(f"the initial root cannot be read: {exc}", log="") from exc


async def restore(place: Place, spec: VmSpec, parts: RestoreParts) -> Handles:
    """Bring a machine back: guestd has said hello, the workload is still stopped."""
    layout = place.layout
    ram = "" if parts.template is None else str(parts.template.ram)
    journal = Journal(spec=spec, phase="starting", template_ram=ram)
    total = spec.memory_bytes // PAGE_BYTES
    async with _starting(place, journal, keep_disk=False):
        base = map_ram(ram)
        if base is not None and len(base) != total:
            raise InvalidSpec(f"the template's memory has {len(base)} pages, the machine wants {total}")
        folder = paths.image(layout)
        known = await in_thread(pages.unpack, folder, parts.vmstate, parts.memory, base, total)
        _blank_disk(layout, spec.disk_bytes)
        words = ["restore", f"--bundle={paths.bundle(layout)}", f"--image-path={folder}", CONTAINER]
        known.save(paths.known(layout))
        vm = await _run(place, journal, words, known)
        shutil.rmtree(folder, ignore_errors=True)  # three files in memory; no await once the machine is whole
        return vm


def _blank_disk(layout: Layout, size: int) -> None:
    """Files are in the machine's memory; the disk that the contract speaks of is there, and empty."""
    layout.directory.mkdir(parents=True, exist_ok=True)
    layout.disk.unlink(missing_ok=True)
    with layout.disk.open("wb") as disk:
        disk.truncate(size)


@contextlib.asynccontextmanager
async def _starting(place: Place, journal: Journal, *, keep_disk: bool) -> AsyncIterator[None]:
    """Make the run folder; on any failure end and remove all that was made since."""
    layout = place.layout
    try:
        layout.run.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise Conflict(f"a machine {layout.run.name} is there already") from None
    except OSError as exc:
        raise DriverFailed(f"the run folder cannot be made: {exc}", log="") from exc
    try:
        for folder in (paths.init(layout), paths.state(layout), layout.run / "r"):
            folder.mkdir()
        write_journal(layout, journal)
        spec = journal.spec
        content = bundle.config(spec, root=layout.run / "r", init=paths.init(layout), user=os.geteuid())
        bundle.write(paths.bundle(layout), content)
        layout.ram.touch()  # the keeper wants to be told of a RAM file; it reads it in captures only
        with space_errors(str(layout.run)):
            yield
    except BaseException as exc:
        await asyncio.shield(_undo(layout, keep_disk=keep_disk))
        if isinstance(exc, OSError) and not isinstance(exc, RecessError):
            raise DriverFailed(f"the machine could not be started: {exc}", log="") from exc
        raise


async def _undo(layout: Layout, *, keep_disk: bool) -> None:
    keeper: Keeper | None = None
    with contextlib.suppress(DriverFailed):
        keeper = Keeper.connect(layout)
    await end_machine(layout, keeper)
    if keeper is not None:
        keeper.close()
    if not keep_disk:
        layout.remove_disks()


async def _run(place: Place, journal: Journal, words: list[str], known: Known) -> Handles:
    layout, began = place.layout, time.monotonic()
    argv = runsc_cli.quoted(
        place.runsc.argv(paths.state(layout), *words), cores_for(layout.run.name, journal.spec.cpus)
    )
    # A group that is made and in no journal is empty, and swept by a later server.
    group = await in_thread(lambda: Groups.find().make(limits_of(journal.spec))) if place.limited else None
    if group is not None:
        journal = dataclasses.replace(journal, group=str(group))
        write_journal(layout, journal)
    await in_thread(keepers.launch, place.keeper_binary, layout, layout.ram, argv, group=group)
    keeper = Keeper.connect(layout)
    port = Port(relay_starter(place.runsc, layout), hello_timeout_s=_HELLO_TIMEOUT_S)
    try:
        await unless_dead(keeper, words[0], _running(layout))
        up, family = time.monotonic(), processes(layout)
        await unless_dead(keeper, words[0], port.attach())
        journal = dataclasses.replace(journal, phase="running", fingerprint=place.fingerprint)
        write_journal(layout, journal)
    except BaseException:
        await port.close()
        keeper.close()
        raise
    timings = {"runsc": up - began, "hello": time.monotonic() - up, "total": time.monotonic() - began}
    return Handles(layout, journal, place.runsc, place.fingerprint, keeper, port, family, known, timings)


async def _running(layout: Layout) -> None:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await runsc_cli.wait_running(paths.state(layout))
    except TimeoutError as exc:
        raise Timeout(f"the machine did not start within {_START_TIMEOUT_S:g} s") from exc


async def adopt(place: Place) -> Handles | None:
    """Take over the machine of this layout, or end what is left of it and return None.

    A capture that the earlier server did not finish left a mark with the state before it, and maybe an image that
    goes on by itself: runsc's commands wait for it, and the state is put right here.
    """
    layout = place.layout
    journal = read_journal(layout)
    keeper: Keeper | None = None
    port: Port | None = None
    try:
        if journal is None or journal.phase != "running":
            raise DriverFailed("nothing that can be taken over", log="")
        keeper = Keeper.connect(layout)
        port = Port(relay_starter(place.runsc, layout), hello_timeout_s=_HELLO_TIMEOUT_S)
        fingerprint = journal.fingerprint or place.fingerprint
        vm = Handles(layout, journal, place.runsc, fingerprint, keeper, port, processes(layout))
        vm.known = await in_thread(Known.load, paths.known(layout))
        if vm.status() == PAUSED and _before_capture(layout) == RUNNING:
            await vm.command("resume")
        layout.capturing.unlink(missing_ok=True)
        await in_thread(shutil.rmtree, paths.image(layout), ignore_errors=True)
        if vm.status() == RUNNING:
            await unless_dead(keeper, "adoption", port.attach())
        return vm
    except RecessError:
        if port is not None:
            await port.close()
        await end_machine(layout, keeper)
        if keeper is not None:
            keeper.close()
        return None


def _before_capture(layout: Layout) -> str:
    try:
        return layout.capturing.read_text()
    except OSError:
        return ""
