"""Machines of all sizes, put away and brought back: one to four processors, 128 MiB to 8 GiB.

A large machine's memory is mostly not there: what is touched is a few hundred megabytes, so that it fits beside others. Its first
boot wants room for all of it, though, so where shared memory has less the run folder is on a disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recess.node.local import LocalNode
from recess.units import MIB
from tests.hard.test_hard_guests import size_of, tell
from tests.machines.test_sizes import size_for, sized_life

pytestmark = [pytest.mark.machines, pytest.mark.timeout(1500)]


@pytest.fixture
def run_base(memory_mib: int, driver: str) -> Path:
    shared, disk = Path("/dev/shm"), Path("/var/tmp")
    fits = driver != "qemu" or shutil.disk_usage(shared).free > memory_mib * MIB
    return shared if fits else disk


@pytest.mark.parametrize(
    ("cpus", "memory_mib", "touch_mib"), [(1, 128, 8), (2, 512, 64), (2, 2048, 128), (4, 1024, 64), (4, 8192, 256)]
)
async def test_a_machine_of_this_size(node: LocalNode, driver: str, cpus: int, memory_mib: int, touch_mib: int) -> None:
    spec = size_for(driver, cpus, memory_mib)
    snapshot, report = await sized_life(node, spec, touch_mib)
    tell(
        f"{spec.cpus} CPUs, {memory_mib} MiB",
        driver,
        stored_mb=size_of(snapshot),
        back_s=round(report.seconds, 2),
        run_dir=str(node.config.run_dir.parent),
    )
