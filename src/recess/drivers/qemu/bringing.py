"""Bringing a VM's memory back before it runs: mapped in place, all of it put there, or its pages brought as touched.

Which of them is the caller's choice (`RestoreParts.mapped`, `.lazy`, or neither); a host that cannot map, or cannot serve
faults, or that is told not to (`page_tracking`), falls back to putting everything there, and says so.
"""

from __future__ import annotations

from recess.drivers.kept import disk
from recess.drivers.kept.keeper import read_pids
from recess.drivers.kept.steps import in_thread
from recess.drivers.qemu.handles import Handles
from recess.drivers.qemu.memory import begin_lazy, begin_tracking, map_in_place
from recess.machines.contract import MappedMemory, PageSet, RestoreParts

_SHARED = "its memory is not a private mapping"


async def bring_memory(vm: Handles, parts: RestoreParts, pages_fd: int, *, mode: str) -> None:
    """Bring and track the memory of a VM that has not run yet. `pages_fd` holds the pages of `parts`, packed, unless they
    are to be mapped or brought lazily; then it is empty.

    Raises DriverFailed, OutOfSpace, Timeout, and what reading a store raises.
    """
    vm.memory = parts.choice or "inject: it was at hand"
    count = parts.memory.count
    if parts.mapped is not None:
        count = await _mapped(vm, parts, parts.mapped, pages_fd)
    elif parts.lazy is not None:
        refused = f"page_tracking = {mode}" if mode != "auto" else _SHARED
        if mode == "auto" and not vm.journal.shared:
            tracking = await begin_lazy(vm.keeper, read_pids(vm.layout)["vmm"], parts.snapshot, parts.lazy)
            if tracking.exact:
                vm.tracking, vm.lazy = tracking, parts.lazy
                return
            refused = tracking.why
        vm.memory = f"inject: {refused}"
        pages = await parts.lazy.read_all()
        await parts.lazy.close()
        count = await _pack(pages_fd, pages)
    if count:
        await vm.keeper.inject(pages_fd, count)
    vm.tracking = await begin_tracking(vm.keeper, parts.snapshot, mode=mode)


async def _mapped(vm: Handles, parts: RestoreParts, mapped: MappedMemory, pages_fd: int) -> int:
    """Map; return how many pages are still to be put there, packed: strays, or all if the host refuses."""
    refused = _SHARED if vm.journal.shared else await map_in_place(vm.keeper, mapped)
    if not refused:
        return await _pack(pages_fd, await in_thread(disk.read_runs, mapped.files, mapped.strays))
    vm.memory = f"inject: {refused}"
    if parts.memory.count:
        return await _pack(pages_fd, parts.memory)
    count = await _pack(pages_fd, await in_thread(disk.read_runs, mapped.files, mapped.runs))
    await vm.keeper.inject(pages_fd, count)
    return await _pack(pages_fd, await in_thread(disk.read_runs, mapped.files, mapped.strays))


async def _pack(pages_fd: int, pages: PageSet) -> int:
    await in_thread(disk.pack_pages, pages_fd, *disk.as_arrays(pages))
    return pages.count
