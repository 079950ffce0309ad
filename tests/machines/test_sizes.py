"""Machines of several processors and of a small memory, put away, brought back and forked, under the drivers that are here.

The large ones take minutes under emulation: `tests/hard/test_sizes.py`.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from recess.config import Config, load_config
from recess.drivers.gvisor.runsc import find_runsc
from recess.machines.service import MachineSpec, ResumeReport, SnapshotRow
from recess.node.local import LocalNode
from recess.testing.gvisor_rig import has_runsc
from recess.units import GIB, MIB
from tests.machines.test_at_hand import sh


def size_for(driver: str, cpus: int, memory_mib: int) -> MachineSpec:
    """Return the spec of a machine of this size. gVisor's processors are the host's own: it has no more than that."""
    if driver == "gvisor":
        cpus = min(cpus, len(os.sched_getaffinity(0)))
    return MachineSpec(memory_bytes=memory_mib * MIB, cpus=cpus, disk_bytes=GIB, driver=driver)


async def sized_life(node: LocalNode, spec: MachineSpec, touch_mib: int) -> tuple[SnapshotRow, ResumeReport]:
    """Fill memory with what is not all alike, put the machine away, bring it back and fork it: its sum stays the same, and
    so does the number of its processors, all of which work."""
    row = await node.machines.create(spec)
    summed = "md5sum </dev/shm/data"
    busy = f"set -e; for cpu in $(seq 0 {spec.cpus - 1}); do taskset -c $cpu true; done; nproc"
    before = await sh(node, row.id, f"head -c {touch_mib}000000 /dev/urandom >/dev/shm/data; {summed}")
    assert (await sh(node, row.id, busy)).strip() == str(spec.cpus)
    snapshot = await node.machines.suspend(row.id)
    report = await node.machines.resume(row.id)
    assert report.rung == 2
    (child,) = await node.machines.fork(row.id)
    for one in (row, child):
        assert await sh(node, one.id, summed) == before
        assert (await sh(node, one.id, busy)).strip() == str(spec.cpus)
    for one in (row, child):
        await node.machines.remove(one.id, force=True)
    return snapshot, report


@pytest.mark.parametrize("driver", ["qemu", "gvisor"])
async def test_two_processors_and_little_memory(real_config: Config, driver: str) -> None:
    if driver == "gvisor" and not has_runsc():
        pytest.skip("runsc is not installed")
    runsc = str(find_runsc(load_config())) if has_runsc() else ""
    node = await LocalNode.open(replace(real_config, driver=driver, runsc_bin=runsc))
    try:
        await sized_life(node, size_for(driver, 2, 128), 8)
    finally:
        await node.close(detach=False)
