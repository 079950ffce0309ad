"""Bringing a VM's memory back before it runs: all of it put there, or its pages brought as they are touched.

Which of the two is the caller's choice (`RestoreParts.lazy`); a host that cannot serve faults, or that is told not to
(`page_tracking`), falls back to putting everything there, and says so.
"""

from __future__ import annotations

from recess.drivers.qemu import disk
from recess.drivers.qemu.handles import Handles, in_thread
from recess.drivers.qemu.memory import begin_lazy, begin_tracking
from recess.machines.contract import RestoreParts


async def bring_memory(vm: Handles, parts: RestoreParts, pages_fd: int, *, mode: str) -> None:
    """Bring and track the memory of a VM that has not run yet. `pages_fd` holds the pages of `parts`, packed.

    Raises DriverFailed, OutOfSpace, Timeout, and what reading a store raises.
    """
    vm.memory = parts.choice or "inject: it was at hand"
    count = parts.memory.count
    if parts.lazy is not None:
        refused = f"page_tracking = {mode}" if mode != "auto" else "its memory is not a private mapping"
        if mode == "auto" and not vm.journal.shared:
            tracking = await begin_lazy(vm.keeper, parts.snapshot, parts.lazy)
            if tracking.exact:
                vm.tracking, vm.lazy = tracking, parts.lazy
                return
            refused = tracking.why
        vm.memory = f"inject: {refused}"
        pages = await parts.lazy.read_all()
        await parts.lazy.close()
        await in_thread(disk.pack_pages, pages_fd, *disk.as_arrays(pages))
        count = pages.count
    if count:
        await vm.keeper.inject(pages_fd, count)
    vm.tracking = await begin_tracking(vm.keeper, parts.snapshot, mode=mode)
