"""Machines of all sizes, put away and brought back: one to four processors, 128 MiB to 8 GiB.

A large machine's memory is mostly not there: what is touched is a few hundred megabytes, so that it fits beside others.
"""

from __future__ import annotations

import os

import pytest

from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.units import MIB
from tests.hard.test_hard_guests import sh, size_of, tell

pytestmark = [pytest.mark.machines, pytest.mark.timeout(1500)]

# Memory that is not all alike, spread over what there is, and its sum before and after.
TOUCH = "head -c {mib}000000 /dev/urandom >/dev/shm/data; md5sum </dev/shm/data"


@pytest.mark.parametrize(
    ("cpus", "memory_mib", "touch_mib"), [(1, 128, 8), (2, 512, 64), (2, 2048, 128), (4, 8192, 256)]
)
async def test_a_machine_of_this_size(node: LocalNode, driver: str, cpus: int, memory_mib: int, touch_mib: int) -> None:
    if driver == "gvisor":  # its processors are the host's own; more is refused (tests/unit/drivers/gvisor)
        cpus = min(cpus, len(os.sched_getaffinity(0)))
    spec = MachineSpec(memory_bytes=memory_mib * MIB, cpus=cpus, disk_bytes=1 << 30, driver=driver)
    row = await node.machines.create(spec, name="sized")
    before = await sh(node, row.id, TOUCH.format(mib=touch_mib))
    assert (await sh(node, row.id, "nproc")).strip() == str(cpus)
    snapshot = await node.machines.suspend(row.id)
    report = await node.machines.resume(row.id)
    assert report.rung == 2
    assert await sh(node, row.id, "md5sum </dev/shm/data") == before
    assert (await sh(node, row.id, "nproc")).strip() == str(cpus)
    (child,) = await node.machines.fork(row.id)
    assert await sh(node, child.id, "md5sum </dev/shm/data") == before
    tell(f"{cpus} CPUs, {memory_mib} MiB", driver, stored_mb=size_of(snapshot), back_s=round(report.seconds, 2))
