"""A booted VM becomes a template: its RAM file, disk and device state stay, the VM goes.

The files get their names with the device state last: a folder without it is no template, and may be removed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from recess.drivers.qemu import disk
from recess.drivers.qemu.handles import Handles, in_thread
from recess.drivers.qemu.keeper import end_vm
from recess.drivers.qemu.state import save_state
from recess.images.files import space_errors
from recess.machines.contract import TemplateRef


async def export_template(vm: Handles, directory: Path) -> TemplateRef:
    """Stop the VM for good and move its parts. On an error nothing is left in `directory`, and the VM is ended."""
    ref = TemplateRef(
        id=vm.layout.run.name, ram=directory / "ram", disk=directory / "disk", vmstate=directory / "vmstate"
    )
    try:
        async with vm.explain("export"), vm.port.silence():
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


def _move_ram(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    disk.punch_zero_pages(source)
    _move_sparse(source, target)


def _finish(vm: Handles, ref: TemplateRef, state: bytes) -> None:
    _move_sparse(vm.layout.disk, ref.disk)
    with space_errors(str(ref.vmstate)):
        aside = ref.vmstate.with_name("vmstate.new")
        aside.write_bytes(state)
        aside.replace(ref.vmstate)


def _move_sparse(source: Path, target: Path) -> None:
    """Rename, or copy the data between filesystems."""
    try:
        source.replace(target)
    except OSError:
        target.unlink(missing_ok=True)
        fd = disk.create_sparse(target, source.stat().st_size)
        try:
            disk.copy_data(source, fd)
        finally:
            os.close(fd)
        shutil.copymode(source, target)
        source.unlink()
