"""One snapshot's raw material: memory, disk and device state of one instant, with the shortest standstill.

    before the pause    the disk's target is made (and filled, if its whole is wanted); the keeper copies what was written
                        so far, and touches its buffer; the caller freezes the workload (`before_pause`); the channel
                        falls silent
    in the pause        stop; the keeper copies the rest while QEMU saves its devices and begins the disk's
                        copy-before-write; cont
    after it            the caller lets the workload go (`after_resume`); QEMU does the disk's copy; the changed
                        blocks are picked out, the pages put in order

If anything fails the disk's copy is given up, the VM runs again if it ran before, and nothing is left: every file
here is nameless from the start. If the server dies in between, the next one finds the mark `capturing` and undoes it
(`undo_interrupted`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from recess.drivers.kept import disk
from recess.drivers.kept.capturing import clear_capturing, interrupted_capture, mark_capturing
from recess.drivers.kept.steps import Steps, all_of, in_thread
from recess.drivers.qemu.blocks import DiskCopy, DiskPlan, drop_copy, live_copy, plan_copy
from recess.drivers.qemu.handles import Handles
from recess.drivers.qemu.memory import MemoryCapture, plan_capture
from recess.drivers.qemu.state import save_state
from recess.errors import OutOfSpace, RecessError
from recess.machines.contract import Capture, Hook
from recess.units import MIB, PAGE_BYTES

_CONSOLE_FDSET = 1
_SPARE_BYTES = 4 * MIB

Take = Callable[[], Awaitable[bytes]]


async def capture(
    vm: Handles,
    *,
    resume: bool,
    before_pause: Hook | None = None,
    after_resume: Hook | None = None,
    parent: str = "",
    disk_too: bool = False,
) -> Capture:
    """Take a capture; see `machines.contract.Vm.capture`."""
    steps = Steps()
    memory = MemoryCapture(vm.keeper, plan_capture(vm.tracking, vm.journal, parent))
    with contextlib.ExitStack() as stack:
        async with vm.explain("capture"):
            ran = await vm.running()
            try:
                plan = await plan_copy(vm, memory.plan.parent if disk_too else "")
                await _check_space(vm, plan)
                target = stack.enter_context(disk.scratch_file(vm.layout.directory))
                put_over = await in_thread(_fill_target, vm, plan, target.fileno())
                steps.mark("fill_target")
                async with _disk_copy(vm, plan, target.fileno()) as copy:
                    steps.mark("open_target")
                    await memory.prepare()  # last, so that the pause finds little left
                    steps.mark("prepare")
                    if before_pause is not None:
                        await before_pause()
                        steps.mark("before_pause")
                    take = partial(_take, vm, memory, copy)
                    state, standstill_s = await _pause(vm, take, ran=ran, resume=resume, steps=steps)
                    if ran and resume and after_resume is not None:
                        await after_resume()
                        steps.mark("after_resume")
                    changed, pages = await all_of(copy.finish(), memory.collect())  # QEMU's work and the keeper's
                    stack.callback(pages.close)
                    steps.mark("collect")
                    blocks = await in_thread(_pick_blocks, vm, plan, target.fileno(), changed, put_over)
                    stack.callback(blocks.close)
                    steps.mark("disk_compare")
                steps.mark("disk_drop")
                clear_capturing(vm.layout)
            except BaseException:
                await asyncio.shield(_run_on(vm, memory, ran=ran))
                raise
        vm.disk_after = memory.generation
        stack.pop_all()
        target.close()
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
        disk_zeros=blocks.zeros.astype("<u4").tobytes(),
        parent=memory.plan.parent,
        disk_parent=plan.parent,
        generation=memory.generation,
        memory_file=pages.fd,
    )


async def _run_on(vm: Handles, memory: MemoryCapture, *, ran: bool) -> None:
    """After a failure: the VM goes on if it ran, also from an error of its disk that the full host caused."""
    await memory.drop()
    with contextlib.suppress(RecessError):
        if ran:
            await vm.qmp.execute("cont")
        clear_capturing(vm.layout)


async def _check_space(vm: Handles, plan: DiskPlan) -> None:
    """Refuse early when the disk's copy cannot fit: a write that fails inside QEMU would hurt the guest."""
    written = min(
        plan.bytes, disk.allocated_bytes(vm.layout.disk)
    )  # the rest was discarded since: holes, which stay holes
    needed = 2 * written + _SPARE_BYTES
    free = shutil.disk_usage(vm.layout.directory).free
    if free < needed:
        raise OutOfSpace(
            f"a snapshot needs {needed >> 20} MiB free in {vm.layout.directory}, there are {free >> 20} MiB",
            hint="free some space, or set RECESS_HOME to a larger disk",
        )


def _fill_target(vm: Handles, plan: DiskPlan, target: int) -> disk.Indices:
    """Give the copy's target its size. For the disk's whole write what a restore had put there, and return which blocks that
    are; and before it, if all will be compared, the disk as it was when the VM was started."""
    os.truncate(target, vm.journal.spec.disk_bytes)
    if plan.parent:
        return disk.no_blocks()
    if not plan.listed:
        disk.copy_data(Path(vm.journal.disk_base), target)
    packed = disk.read_packed(vm.layout.disk_delta)
    indices, data = disk.as_arrays(packed.pages)
    disk.write_pages(target, indices, data)
    put_over = indices.copy()
    del indices, data
    packed.close()
    return put_over


def _pick_blocks(
    vm: Handles, plan: DiskPlan, target: int, changed: disk.Indices, put_over: disk.Indices
) -> disk.Packed:
    """Take out of the copy what the capture gives out."""
    base = Path(vm.journal.disk_base) if vm.journal.base == "template" else None
    if plan.listed:
        numbers = np.union1d(changed, put_over).astype(np.uint32)
        return disk.pick_blocks(target, numbers, vm.layout.directory, over=None if plan.parent else base)
    return disk.changed_blocks(base, target, put_over, vm.layout.directory)


def _disk_copy(vm: Handles, plan: DiskPlan, target: int) -> contextlib.AbstractAsyncContextManager[DiskCopy]:
    if vm.host.qemu.devices_command:
        return live_copy(vm, plan, target)
    # A migration takes the disks away from QEMU until `cont`, so a job cannot start: copy in the pause.
    return contextlib.nullcontext(_StoppedCopy(vm, target))


class _StoppedCopy:
    """The whole disk, copied by ourselves while nobody writes."""

    def __init__(self, vm: Handles, target: int) -> None:
        self._vm = vm
        self._target = target

    async def start(self) -> None:
        """Do it."""
        await in_thread(self._copy)

    def _copy(self) -> None:
        os.truncate(self._target, 0)
        os.truncate(self._target, self._vm.journal.spec.disk_bytes)
        disk.copy_data(self._vm.layout.disk, self._target)

    async def finish(self) -> disk.Indices:
        """Nothing is left to do."""
        return disk.no_blocks()


async def _pause(vm: Handles, take: Take, *, ran: bool, resume: bool, steps: Steps) -> tuple[bytes, float]:
    """Stop the VM, take everything that must be of one instant, let it run. Returns device state, standstill."""
    async with vm.port.silence() as speak:
        mark_capturing(vm.layout, "running" if ran else "paused")
        steps.mark("silence")
        began = time.monotonic()
        # The second command gives QEMU's main loop a turn: what was ready before the stop has then been done.
        await asyncio.gather(vm.qmp.execute("stop"), vm.qmp.execute("query-status"))
        steps.mark("stop")
        state = await take()
        steps.mark("take")
        standstill_s = 0.0
        if ran and resume:
            await vm.qmp.execute("cont")
            standstill_s = time.monotonic() - began
            clear_capturing(vm.layout)
            speak()
        steps.mark("cont")
    return state, standstill_s


async def _take(vm: Handles, memory: MemoryCapture, copy: DiskCopy) -> bytes:
    """Everything of the instant, side by side; the copy of the disk only begins, after QEMU has saved its devices."""
    _, state = await all_of(memory.take(), _save_and_start(vm, copy))
    return cast(bytes, state)


async def _save_and_start(vm: Handles, copy: DiskCopy) -> bytes:
    state = await save_state(vm.qmp, devices_command=vm.host.qemu.devices_command, shared=vm.journal.shared)
    await copy.start()
    return state


async def undo_interrupted(vm: Handles) -> None:
    """After a server died in the middle of a capture: drop what it began, and let the VM run if it ran before."""
    await drop_copy(vm.qmp)
    for entry in await vm.qmp.execute("query-fdsets"):
        if entry["fdset-id"] != _CONSOLE_FDSET:
            await vm.qmp.execute("remove-fd", {"fdset-id": entry["fdset-id"]})
    if interrupted_capture(vm.layout) == "running":
        await vm.qmp.execute("cont")
    clear_capturing(vm.layout)
