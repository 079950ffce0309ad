"""A capture: the relay goes, gVisor writes its image, the relay comes back; then the pages are sorted out.

gVisor stands still while it writes the image, into shared memory. The mark `capturing` holds the state before, for
a server that finds the machine after this one died in between.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from recess.drivers.gvisor import journal as paths
from recess.drivers.gvisor import pages
from recess.drivers.gvisor.handles import Handles, end_machine, map_ram
from recess.drivers.gvisor.pages import Known
from recess.drivers.gvisor.runsc import PAUSED, RUNNING
from recess.drivers.kept.steps import in_thread
from recess.errors import DriverFailed
from recess.images.files import space_errors
from recess.machines.contract import Capture, Hook, PageSet, TemplateRef
from recess.units import PAGE_BYTES

_NOTHING = PageSet(memoryview(b""), memoryview(b""))


async def capture(vm: Handles, *, resume: bool, before_pause: Hook | None, after_resume: Hook | None) -> Capture:
    """Take everything of one instant. On an error the machine is in the state it was in before."""
    before = vm.status()
    if before not in (RUNNING, PAUSED):
        raise DriverFailed(f"the machine is {before or 'gone'}", log="")
    if before_pause is not None:
        await before_pause()
    folder = paths.image(vm.layout)
    vm.layout.capturing.write_text(before)
    began = time.monotonic()
    try:
        stood_s = await _write_image(vm, folder, pause=not resume)
        if resume:
            await _go_on(vm)
    except BaseException:
        if before == RUNNING:
            await _go_on(vm)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        vm.layout.capturing.unlink(missing_ok=True)
    back = time.monotonic()
    try:
        if after_resume is not None and resume:
            await after_resume()
        out = await in_thread(_sort_out, vm, folder)
    finally:
        await in_thread(shutil.rmtree, folder, ignore_errors=True)
    out.standstill_s = stood_s if resume else 0.0
    out.timings_s = {"checkpoint": stood_s, "channel": back - began - stood_s, "sort": time.monotonic() - back}
    return out


async def _write_image(vm: Handles, folder: Path, *, pause: bool) -> float:
    """Write the image; return how long it took. Stays paused where it was, and with `pause`."""
    shutil.rmtree(folder, ignore_errors=True)
    await vm.port.leave()
    if pause and vm.status() == RUNNING:
        await vm.command("pause")
    began = time.monotonic()
    await vm.command("checkpoint", f"--image-path={folder}", "--compression=none", "--leave-running")
    return time.monotonic() - began


async def _go_on(vm: Handles) -> None:
    if vm.status() == PAUSED:
        await vm.command("resume")
    await vm.port.attach()


def _sort_out(vm: Handles, folder: Path) -> Capture:
    content = pages.load(folder)
    assigned = pages.assign(content, vm.known, vm.pages_total)
    base = map_ram(vm.journal.template_ram)
    out = Capture(
        memory=pages.differing(content, assigned, base),
        disk=_NOTHING,
        vmstate=pages.pack_state(folder, assigned.numbers),
        base="boot" if base is None else "template",
        fingerprint=vm.fingerprint,
        standstill_s=0.0,
        memory_pages_total=vm.pages_total,
        disk_blocks_total=vm.journal.spec.disk_bytes // PAGE_BYTES,
    )
    vm.known = assigned.known
    vm.known.save(paths.known(vm.layout))
    return out


async def export_template(vm: Handles, directory: Path) -> TemplateRef:
    """End the machine and leave its memory, an empty disk and the device state (last) as a template's files."""
    ref = TemplateRef(vm.layout.run.name, directory / "ram", directory / "disk", directory / "vmstate")
    folder = paths.image(vm.layout)
    try:
        await _write_image(vm, folder, pause=True)
        await in_thread(_write_template, vm, folder, ref)
        await end_machine(vm.layout, vm.keeper, vm.family, vm.journal)
    except BaseException:
        await end_machine(vm.layout, vm.keeper, vm.family, vm.journal)
        for path in (ref.vmstate, ref.disk, ref.ram):
            path.unlink(missing_ok=True)
        raise
    return ref


def _write_template(vm: Handles, folder: Path, ref: TemplateRef) -> None:
    ref.ram.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = pages.load(folder)
    assigned = pages.assign(content, Known(), vm.pages_total)
    with space_errors(str(ref.ram)):
        with ref.ram.open("wb") as ram:
            ram.truncate(vm.journal.spec.memory_bytes)
            for row in assigned.rows:
                os.pwrite(ram.fileno(), content[row].data, int(assigned.numbers[row]) * PAGE_BYTES)
        with ref.disk.open("wb") as disk:
            disk.truncate(vm.journal.spec.disk_bytes)
        aside = ref.vmstate.with_name("vmstate.new")
        aside.write_bytes(pages.pack_state(folder, assigned.numbers))
        aside.replace(ref.vmstate)
