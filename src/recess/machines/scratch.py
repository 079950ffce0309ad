"""Scratch machines: a stored snapshot brought to life for a look, and ended.

The guest is never thawed: guestd answers, but the workload stays frozen as it was at the capture, so that nothing in it
runs, goes out or notices. It has no row, no name, no ports and no way out; a server that dies leaves a VM without a row,
which the next one ends. What a look may not do: write into the guest, or hand the machine to anybody.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from recess.ids import new_id
from recess.machines.contract import Vm
from recess.machines.parts import Parts
from recess.machines.starting import Origin, finish


@asynccontextmanager
async def scratch_vm(parts: Parts, origin: Origin) -> AsyncIterator[Vm]:
    """Restore a VM whose workload is frozen; end it and all that is of it whatever happens inside.

    Raises what `Driver.restore` raises.
    """
    vm_id = new_id("mch")
    directory = parts.directory(vm_id)
    try:
        vm = await parts.driver_of(origin.template.spec.driver).restore(
            vm_id, origin.template.spec, origin.parts, directory
        )
        try:
            yield vm
        finally:
            await finish(vm.kill())
    finally:
        await finish(_remove(directory))


async def _remove(directory: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
