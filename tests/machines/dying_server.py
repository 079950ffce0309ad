"""A server for a test to lose: forks a machine, says its id, and dies by SIGKILL where it was told to.

usage: dying_server.py RUN_DIR HOME TEMPLATE_DIR MACHINE_DIR WHERE

WHERE: idle | capture | restore, a crash point `qemu.*` (with the disks of the stored snp_1 and snp_2 beside MACHINE_DIR), or with a warm pool: waiting | taking | taken | running
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from recess.config import load_config
from recess.crashpoints import arm
from recess.drivers.qemu import QemuDriver, capture, pool_member, start
from recess.images.disk import clone_sparse
from recess.machines.contract import DISK_NAME, RestoreParts, TemplateRef, Vm
from recess.testing.driver_suite import NO_PAGES, new_thaw, shell
from recess.testing.qemu_rig import prime_pool, spec_of


def die(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def serve(run_dir: str, home: str, template: str, machine: str, where: str) -> None:
    pooled = where in ("waiting", "taking", "taken", "running")
    config = load_config(home=home, run_dir=run_dir, warm_pool_max=int(pooled))
    driver = QemuDriver(config)
    folder = Path(template)
    ref = TemplateRef("template", folder / "ram", folder / "disk", folder / "vmstate")
    if pooled:
        await prime_pool(driver, spec_of(config), ref, Path(machine).parent)
    if where == "waiting":
        die()
    if where == "taking":
        pool_member.write_journal = die  # it is still nobody's
    if where in ("restore", "taken"):
        start.load_state = die
    if where == "running":
        pool_member.Member.untie = die  # the journal says that it runs
    parts = RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes())
    vm = await driver.restore("lost", spec_of(config), parts, Path(machine))
    await vm.link.thaw(new_thaw())
    await shell(vm.link, "echo before > /dev/shm/word")
    if where == "capture":
        capture.save_state = die  # the VM is stopped, nothing is saved yet
        await vm.capture(resume=True)
    if where.startswith("qemu."):
        await die_at(where, vm, Path(machine))
    die()


async def die_at(point: str, vm: Vm, machine: Path) -> None:
    """Store one capture; die at this point with a second."""
    for name in ("snp_1", "snp_2"):
        await shell(vm.link, f"head -c 3000000 /dev/urandom > /root/{name}; sync")
        await vm.link.freeze()
        if name == "snp_2":
            arm(point, kill=True)
        taken = await vm.capture(resume=False, parent="snp_1", disk_too=True)
        clone_sparse(machine / DISK_NAME, machine.parent / name)
        await vm.unpause()
        await vm.link.unfreeze()
        await vm.committed(taken, name)


asyncio.run(serve(*sys.argv[1:]))
