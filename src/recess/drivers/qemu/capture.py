"""One snapshot's raw material: memory, disk and device state of one instant, with the shortest standstill.

    before the pause    the disk's target is filled and opened; the keeper copies what was written so far, and touches
                        its buffer; the caller freezes the workload (`before_pause`); the channel falls silent
    in the pause        stop; the keeper copies the rest while QEMU saves its devices and starts the disk's
                        copy-before-write; cont
    after it            the caller lets the workload go (`after_resume`); QEMU finishes the disk's copy; the changed
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
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from recess.drivers.kept import disk
from recess.drivers.kept.capturing import clear_capturing, interrupted_capture, mark_capturing
from recess.drivers.kept.steps import Steps, all_of, in_thread
from recess.drivers.qemu.argv import DISK_NODE
from recess.drivers.qemu.handles import Handles, passed_file
from recess.drivers.qemu.memory import MemoryCapture, plan_capture
from recess.drivers.qemu.qmp import Qmp, QmpRefused
from recess.drivers.qemu.state import save_state
from recess.errors import DriverFailed, OutOfSpace, RecessError, Timeout
from recess.machines.contract import Capture, Hook
from recess.units import MIB, PAGE_BYTES

_BITMAP = "since-start"
_JOB = _TARGET_NODE = "capture"
_CONSOLE_FDSET = 1
_CBW_OPTION_SINCE = (10, 1)
_SPARE_BYTES = 4 * MIB
_JOB_TIMEOUT_S = 600.0
_CANCEL_TIMEOUT_S = 10.0

StartCopy = Callable[[], Awaitable[None]]
Take = Callable[[], Awaitable[bytes]]


async def track_disk(qmp: Qmp) -> None:
    """Note every block the guest writes from now on. To be called before the VM runs for the first time."""
    arguments = {"node": DISK_NODE, "name": _BITMAP, "granularity": PAGE_BYTES}
    await qmp.execute("block-dirty-bitmap-add", arguments)


async def capture(
    vm: Handles,
    *,
    resume: bool,
    before_pause: Hook | None = None,
    after_resume: Hook | None = None,
    parent: str = "",
) -> Capture:
    """Take a capture; see `machines.contract.Vm.capture`."""
    steps = Steps()
    memory = MemoryCapture(vm.keeper, plan_capture(vm.tracking, vm.journal, parent))
    with contextlib.ExitStack() as stack:
        async with vm.explain("capture"):
            ran = await vm.running()
            try:
                await _check_space(vm)
                target = stack.enter_context(disk.scratch_file(vm.layout.directory))
                put_over = await in_thread(_fill_target, vm, target.fileno())
                steps.mark("fill_target")
                async with _disk_copy(vm, target.fileno()) as start_copy:
                    steps.mark("open_target")
                    await memory.prepare()  # last, so that the pause finds little left
                    steps.mark("prepare")
                    if before_pause is not None:
                        await before_pause()
                        steps.mark("before_pause")
                    take = partial(_take, vm, memory, start_copy)
                    state, standstill_s = await _pause(vm, take, ran=ran, resume=resume, steps=steps)
                    if ran and resume and after_resume is not None:
                        await after_resume()
                        steps.mark("after_resume")
                steps.mark("disk_copy")
                base = Path(vm.journal.disk_base) if vm.journal.base == "template" else None
                blocks = await in_thread(disk.changed_blocks, base, target.fileno(), put_over, vm.layout.directory)
                stack.callback(blocks.close)
                steps.mark("disk_compare")
                pages = await memory.collect()
                steps.mark("collect")
                clear_capturing(vm.layout)
            except BaseException:
                await asyncio.shield(_run_on(vm, memory, ran=ran))
                raise
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
        parent=memory.plan.parent,
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


async def _check_space(vm: Handles) -> None:
    """Refuse early when the disk's copy cannot fit: a write that fails inside QEMU would hurt the guest."""
    nodes = await vm.qmp.execute("query-named-block-nodes", {"flat": True})
    bitmaps = [b for n in nodes if n["node-name"] == DISK_NODE for b in n.get("dirty-bitmaps", [])]
    changed = sum(int(b["count"]) for b in bitmaps if b.get("name") == _BITMAP)
    needed = 2 * changed + _SPARE_BYTES
    free = shutil.disk_usage(vm.layout.directory).free
    if free < needed:
        raise OutOfSpace(
            f"a snapshot needs {needed >> 20} MiB free in {vm.layout.directory}, there are {free >> 20} MiB",
            hint="free some space, or set RECESS_HOME to a larger disk",
        )


def _fill_target(vm: Handles, target: int) -> disk.Indices:
    """Write the disk as it was when the VM was started; return which blocks a restore had put there."""
    os.truncate(target, vm.journal.spec.disk_bytes)
    disk.copy_data(Path(vm.journal.disk_base), target)
    packed = disk.read_packed(vm.layout.disk_delta)
    indices, data = disk.as_arrays(packed.pages)
    disk.write_pages(target, indices, data)
    put_over = indices.copy()
    del indices, data
    packed.close()
    return put_over


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


async def _take(vm: Handles, memory: MemoryCapture, start_copy: StartCopy) -> bytes:
    _, state = await all_of(memory.take(), _devices(vm, start_copy))
    return cast(bytes, state)


async def _devices(vm: Handles, start_copy: StartCopy) -> bytes:
    state = await save_state(vm.qmp, devices_command=vm.host.qemu.devices_command, shared=vm.journal.shared)
    await start_copy()
    return state


@contextlib.asynccontextmanager
async def _disk_copy(vm: Handles, target: int) -> AsyncIterator[StartCopy]:
    """Give the block a function that starts the disk's copy; leaving the block waits for it, or gives it up."""
    if not vm.host.qemu.devices_command:
        # A migration takes the disks away from QEMU until `cont`, so a job cannot start: copy in the pause.
        async def copy_now() -> None:
            await in_thread(_copy_stopped_disk, vm, target)

        yield copy_now
        return
    async with passed_file(vm.qmp, target) as name:
        node = {"driver": "file", "node-name": _TARGET_NODE, "filename": name, "locking": "off"}
        await vm.qmp.execute("blockdev-add", {**node, "cache": {"direct": False, "no-flush": True}})
        ended = vm.qmp.expect("BLOCK_JOB_COMPLETED", lambda data: data.get("device") == _JOB)
        try:
            yield lambda: _start_job(vm)
            await _job_done(ended)
        finally:
            ended.cancel()
            await asyncio.shield(_drop_job(vm.qmp))


def _copy_stopped_disk(vm: Handles, target: int) -> None:
    os.truncate(target, 0)
    os.truncate(target, vm.journal.spec.disk_bytes)
    disk.copy_data(vm.layout.disk, target)


async def _start_job(vm: Handles) -> None:
    # The bitmap is never cleared: it goes on saying what differs from the disk that the target was filled with.
    job: dict[str, Any] = {"job-id": _JOB, "device": DISK_NODE, "target": _TARGET_NODE}
    job |= {"sync": "bitmap", "bitmap": _BITMAP, "bitmap-mode": "never"}
    if vm.host.qemu.version[:2] >= _CBW_OPTION_SINCE:
        job["on-cbw-error"] = "break-snapshot"
    await vm.qmp.execute("transaction", {"actions": [{"type": "blockdev-backup", "data": job}]})


async def _job_done(ended: asyncio.Future[Any]) -> None:
    try:
        async with asyncio.timeout(_JOB_TIMEOUT_S):
            data = await ended
    except TimeoutError as exc:
        raise Timeout(f"the disk was not copied within {_JOB_TIMEOUT_S:g} s") from exc
    if error := data.get("error"):
        if "No space" in error:
            raise OutOfSpace(f"no space left while copying the disk: {error}")
        raise DriverFailed(f"the disk could not be copied: {error}")


async def _drop_job(qmp: Qmp) -> None:
    """End the copy if it still runs, and drop its target. Whatever of it is not there is no error."""
    with contextlib.suppress(RecessError):
        cancelled = qmp.expect("BLOCK_JOB_CANCELLED", lambda data: data.get("device") == _JOB)
        try:
            await qmp.execute("block-job-cancel", {"device": _JOB, "force": True})
            await asyncio.wait([cancelled], timeout=_CANCEL_TIMEOUT_S)
        except QmpRefused:
            pass  # it has ended
        finally:
            cancelled.cancel()
    with contextlib.suppress(RecessError):
        await qmp.execute("blockdev-del", {"node-name": _TARGET_NODE})


async def undo_interrupted(vm: Handles) -> None:
    """After a server died in the middle of a capture: drop what it began, and let the VM run if it ran before."""
    await _drop_job(vm.qmp)
    for entry in await vm.qmp.execute("query-fdsets"):
        if entry["fdset-id"] != _CONSOLE_FDSET:
            await vm.qmp.execute("remove-fd", {"fdset-id": entry["fdset-id"]})
    if interrupted_capture(vm.layout) == "running":
        await vm.qmp.execute("cont")
    clear_capturing(vm.layout)
