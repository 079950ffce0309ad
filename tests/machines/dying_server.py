"""A server for a test to lose: forks a machine, says its id, and dies by SIGKILL where it was told to.

usage: dying_server.py RUN_DIR HOME TEMPLATE_DIR MACHINE_DIR WHERE

WHERE: idle | capture | restore, or with a warm pool: waiting | taking | taken | running
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from recess.config import load_config
from recess.drivers.qemu import QemuDriver, capture, pool_member, start
from recess.machines.contract import RestoreParts, TemplateRef
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
    die()


asyncio.run(serve(*sys.argv[1:]))
