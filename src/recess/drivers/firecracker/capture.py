"""One snapshot's raw material: memory, disk and device state of one instant, as Firecracker gives it.

    before the pause    space is checked; the caller freezes the workload (`before_pause`); the channel is taken away
    in the pause        pause; Firecracker writes device state and changed pages into shared memory while the disk is
                        cloned (shared extents where the file system can, else its data is copied); resume
    after it            the channel is back, the caller lets the workload go (`after_resume`); the pages go into the ledger,
                        the disk's changed blocks are picked out

*One instant.* A paused Firecracker answers no request of the guest's: its devices are served by the same thread that takes
the pause, between requests of the API. So nothing is written to the disk while it is cloned.

If anything fails the VM runs again if it ran before, and no file is left; if Firecracker may have cleared its list of
changes, the poison stays (ledger.py) and the next capture takes everything. If the server dies in between, the next one
finds the mark `capturing` and undoes it (`undo_interrupted`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from recess.crashpoints import crash_point
from recess.drivers.firecracker import calls, ledger
from recess.drivers.firecracker.handles import PAUSED, Handles, end_machine, running
from recess.drivers.firecracker.ledger import Plan
from recess.drivers.kept import disk
from recess.drivers.kept.capturing import clear_capturing, interrupted_capture, mark_capturing
from recess.drivers.kept.disk import move_sparse
from recess.drivers.kept.keeper import all_brought
from recess.drivers.kept.steps import Steps, all_of, in_thread
from recess.errors import OutOfSpace, RecessError
from recess.images.disk import clone_sparse
from recess.images.files import space_errors
from recess.machines.contract import Capture, Hook, TemplateRef
from recess.units import MIB, PAGE_BYTES

_SNAPSHOT_S = 600.0
_SPARE_BYTES = 8 * MIB


async def capture(
    vm: Handles,
    *,
    resume: bool,
    before_pause: Hook | None = None,
    after_resume: Hook | None = None,
    parent: str = "",
) -> Capture:
    """Take a capture; see `machines.contract.Vm.capture`. Not to be cancelled: Firecracker cannot be called off."""
    steps = Steps()
    plan = ledger.plan_capture(vm.ledger, parent, poisoned=ledger.is_poisoned(vm.layout.run))
    async with vm.explain("capture"):
        ran = await running(vm)
        try:
            await in_thread(_check_space, vm, plan)
            if not vm.ledger.whole and plan.kind == calls.FULL:
                await all_brought(vm.keeper)  # else the pause would wait for every page
            steps.mark("prepare")
            if before_pause is not None:
                await before_pause()
                steps.mark("before_pause")
            await vm.port.leave()
            steps.mark("leave")
            standstill_s = await _pause(
                vm, plan, resume=ran and resume, mark="running" if ran else "paused", steps=steps
            )
            if ran and resume:
                await vm.port.attach()
                steps.mark("attach")
                if after_resume is not None:
                    await after_resume()
                    steps.mark("after_resume")
            return await _gather(vm, plan, standstill_s, steps)
        except Exception:
            await _go_on(vm, ran=ran)
            raise


def _check_space(vm: Handles, plan: Plan) -> None:
    """Refuse early what cannot fit: the clone of the disk, and in shared memory the pages (bounded by the guest's size)."""
    directory, run = vm.layout.directory, vm.layout.run
    for folder, needed in (
        (directory, 2 * vm.layout.disk.stat().st_blocks * 512 + _SPARE_BYTES),
        (run, (vm.journal.spec.memory_bytes if plan.kind == calls.FULL else 0) + _SPARE_BYTES),
    ):
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutOfSpace(
                f"a snapshot needs {needed >> 20} MiB free in {folder}, there are {free >> 20} MiB",
                hint="free some space, or set RECESS_HOME and RECESS_RUN_DIR to larger disks",
            )


async def _pause(vm: Handles, plan: Plan, *, resume: bool, mark: str, steps: Steps) -> float:
    """Stop the VM, take everything that must be of one instant, let it run with `resume`. Returns the standstill."""
    _drop_files(vm)  # Firecracker merges changes into a file that is there
    mark_capturing(vm.layout, mark)
    began = time.monotonic()
    await vm.api.call(calls.pause())
    steps.mark("pause")
    ledger.poison(vm.layout.run)
    crash_point("firecracker.poisoned")
    taking = calls.create_snapshot(plan.kind, calls.TAKEN_STATE, calls.TAKEN_MEMORY)
    vm.reset = True
    await all_of(
        vm.api.call(taking, timeout_s=_SNAPSHOT_S),
        in_thread(clone_sparse, vm.layout.disk, vm.clone),
    )
    crash_point("firecracker.taken")
    steps.mark("take")
    standstill_s = 0.0
    if resume:
        await let_run(vm)
        standstill_s = time.monotonic() - began
    clear_capturing(vm.layout)
    steps.mark("resume")
    return standstill_s


async def _gather(vm: Handles, plan: Plan, standstill_s: float, steps: Steps) -> Capture:
    """Make of Firecracker's files what the caller gets."""
    run = vm.layout.run
    entered, numbers = await in_thread(
        ledger.enter, run, vm.ledger, plan, run / calls.TAKEN_MEMORY, vm.journal.ram_base
    )
    vm.ledger = entered
    crash_point("firecracker.entered")
    steps.mark("enter")
    with contextlib.ExitStack() as stack:
        pages = await in_thread(ledger.collect, run, numbers)
        stack.callback(pages.close)
        steps.mark("collect")
        blocks = await in_thread(_disk_blocks, vm)
        stack.callback(blocks.close)
        steps.mark("disk_compare")
        state = (run / calls.TAKEN_STATE).read_bytes()
        (run / calls.TAKEN_STATE).unlink()
        stack.pop_all()
    return Capture(
        memory=pages.pages,
        disk=blocks.pages,
        vmstate=state,
        base=vm.journal.base,
        fingerprint=vm.fingerprint,
        standstill_s=standstill_s,
        memory_pages_total=vm.journal.spec.memory_bytes // PAGE_BYTES,
        disk_blocks_total=vm.journal.spec.disk_bytes // PAGE_BYTES,
        timings_s={**steps.timings_s, "total": steps.total()},
        resources=[pages, blocks],
        parent=plan.parent,
        generation=entered.generation,
    )


def _disk_blocks(vm: Handles) -> disk.Packed:
    """Pick out what differs from the template's disk, and drop the clone."""
    with vm.clone.open("rb") as handle:
        vm.clone.unlink()
        nothing = disk.blocks_with_data()
        return disk.changed_blocks(vm.journal.disk_base, handle.fileno(), nothing, vm.layout.directory)


async def _go_on(vm: Handles, *, ran: bool) -> None:
    """After a failure: drop what was begun; the VM goes on if it ran."""
    _drop_files(vm)
    with contextlib.suppress(RecessError):
        if ran:
            await let_run(vm)
            await vm.port.attach()
        clear_capturing(vm.layout)


async def let_run(vm: Handles) -> None:
    """Let a paused VM run. No-op for one that runs.

    Firecracker lets nothing from the host into its vsock after it resumed a VM until the guest has acknowledged that its
    connections are gone, which it tells the guest only when a snapshot is taken (its issue 6100; also when a running VM
    is "resumed"). So a VM of which no snapshot was taken since it was paused gets one now; it goes into the ledger.
    """
    if await vm.api.state() != PAUSED:
        return
    if not vm.reset:
        poisoned = ledger.is_poisoned(vm.layout.run)
        _drop_files(vm)
        ledger.poison(vm.layout.run)
        await vm.api.call(
            calls.create_snapshot(calls.DIFF, calls.TAKEN_STATE, calls.TAKEN_MEMORY), timeout_s=_SNAPSHOT_S
        )
        if not poisoned:
            vm.ledger = await in_thread(ledger.absorb, vm.layout.run, vm.ledger, vm.layout.run / calls.TAKEN_MEMORY)
        _drop_files(vm)
    await vm.api.call(calls.resume())
    vm.reset = False


def _drop_files(vm: Handles) -> None:
    for path in (
        vm.layout.run / calls.TAKEN_STATE,
        vm.layout.run / calls.TAKEN_MEMORY,
        vm.layout.run / f"{ledger.PAGES_FILE}.new",
        vm.clone,
    ):
        path.unlink(missing_ok=True)


async def undo_interrupted(vm: Handles) -> None:
    """After a server died in the middle of a capture: drop what it began, and let the VM run if it ran before. Whether its
    list of changes was cleared is unknown: the poison, if it was set, stays."""
    _drop_files(vm)
    if interrupted_capture(vm.layout) == "running":
        await let_run(vm)
    clear_capturing(vm.layout)


async def export_template(vm: Handles, directory: Path) -> TemplateRef:
    """Stop the VM for good and leave its parts as a template's, the device state last: a folder without it is none. On an
    error nothing is left in `directory`, and the VM is ended."""
    ref = TemplateRef(vm.layout.run.name, directory / "ram", directory / "disk", directory / "vmstate")
    taking = calls.create_snapshot(calls.DIFF, calls.TAKEN_STATE, calls.TAKEN_MEMORY)
    try:
        async with vm.explain("export"):
            await vm.port.leave()
            await vm.api.call(calls.pause())
            await vm.api.call(taking, timeout_s=_SNAPSHOT_S)
            state = (vm.layout.run / calls.TAKEN_STATE).read_bytes()
            await in_thread(_move_memory, vm.layout.run / calls.TAKEN_MEMORY, ref.ram)
            await end_machine(vm.layout, vm.keeper, vm.jail, vm.journal.group)
            await in_thread(_finish, vm, ref, state)
    except BaseException:
        await end_machine(vm.layout, vm.keeper, vm.jail, vm.journal.group)
        for path in (ref.vmstate, ref.disk, ref.ram):
            path.unlink(missing_ok=True)
        raise
    return ref


def _own(path: Path) -> None:
    """Take a file back from a jail's user: a template is nobody's machine."""
    os.chown(path, os.geteuid(), os.getegid())


def _move_memory(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    disk.punch_zero_pages(source)
    move_sparse(source, target)
    _own(target)


def _finish(vm: Handles, ref: TemplateRef, state: bytes) -> None:
    move_sparse(vm.layout.disk, ref.disk)
    _own(ref.disk)
    with space_errors(str(ref.vmstate)):
        aside = ref.vmstate.with_name("vmstate.new")
        aside.write_bytes(state)
        aside.replace(ref.vmstate)
