"""A booted VM becomes a template: its RAM file, disk and device state stay, the VM goes.

The files get their names with the device state last: a folder without it is no template, and may be removed.

The guest rests first. Its kernel has work left over from the warm-up (freed tasks, write-back, statistics), and every
fork would do it again in its first milliseconds, on a machine that is cold.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from pathlib import Path

from recess.drivers.kept import disk
from recess.drivers.kept.keeper import end_vm, read_pids
from recess.drivers.kept.steps import in_thread
from recess.drivers.qemu.handles import Handles
from recess.drivers.qemu.state import save_state
from recess.images.files import space_errors
from recess.machines.contract import TemplateRef

_REST_STEP_S = 0.25
_REST_SHARE = 0.03  # of one CPU
_REST_TIMEOUT_S = 5.0


async def export_template(vm: Handles, directory: Path) -> TemplateRef:
    """Stop the VM for good and move its parts. On an error nothing is left in `directory`, and the VM is ended."""
    ref = TemplateRef(
        id=vm.layout.run.name, ram=directory / "ram", disk=directory / "disk", vmstate=directory / "vmstate"
    )
    try:
        async with vm.explain("export"), vm.port.silence():
            await _until_at_rest(vm)
            await asyncio.gather(vm.qmp.execute("stop"), vm.qmp.execute("query-status"))
            state = await save_state(vm.qmp, devices_command=vm.host.qemu.devices_command, shared=vm.journal.shared)
            # QEMU has its RAM file open, not its name; once stopped it writes no more.
            await in_thread(_move_ram, vm.layout.ram, ref.ram)
            await end_vm(vm.layout, vm.keeper)
            await in_thread(_finish, vm, ref, state)
    except BaseException:
        await end_vm(vm.layout, vm.keeper)
        for path in (ref.vmstate, ref.disk, ref.ram):
            path.unlink(missing_ok=True)
        raise
    return ref


async def _until_at_rest(vm: Handles) -> None:
    """Return when the VMM has used hardly any CPU for a while, or after a bound: a restless guest is as valid."""
    vmm = read_pids(vm.layout).get("vmm")
    end = time.monotonic() + _REST_TIMEOUT_S
    before = -math.inf
    while vmm is not None and time.monotonic() < end:
        used = cpu_s(vmm.pid)
        if used - before < _REST_SHARE * _REST_STEP_S:
            return
        before = used
        await asyncio.sleep(_REST_STEP_S)  # a guest that rests tells nobody


def cpu_s(pid: int) -> float:
    """Return the CPU time of all threads of a process in seconds, to the microsecond; 0 when it is gone."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(task.read_text().split()[0])
    return total / 1e9


def _move_ram(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    disk.punch_zero_pages(source)
    disk.move_sparse(source, target)


def _finish(vm: Handles, ref: TemplateRef, state: bytes) -> None:
    disk.move_sparse(vm.layout.disk, ref.disk)
    with space_errors(str(ref.vmstate)):
        aside = ref.vmstate.with_name("vmstate.new")
        aside.write_bytes(state)
        aside.replace(ref.vmstate)
