"""VMs that wait die, or their server does, at every step on the way to a machine: nothing is left, nobody is misled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recess.demo.processes import processes_of, wait_gone
from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuDriver, QemuVm, pool_member
from recess.drivers.qemu.pool_member import FOLDER, Member
from recess.errors import DriverFailed, OutOfSpace
from recess.machines.contract import RestoreParts, TemplateRef, Vm
from recess.testing.driver_suite import NO_PAGES, shell
from recess.testing.qemu_rig import QemuHome, QemuRig, prime_pool

pytestmark = pytest.mark.machines

WAITED, STARTED = "it waited in the warm pool", "it was started for this"
GONE_S = 60.0  # a bound, for a host that is very busy


@pytest.fixture
async def rig(tmp_path: Path, images_dir: Path) -> AsyncIterator[QemuRig]:
    home = QemuHome.shared(images_dir)
    rig = QemuRig(home=tmp_path, spec=home.spec, qemu=home)
    (tmp_path / "machines").mkdir()
    yield rig
    assert rig.leftovers() == []
    assert list((home.run_dir / FOLDER).glob("*")) == []


@pytest.fixture
async def driver(rig: QemuRig) -> AsyncIterator[QemuDriver]:
    driver = QemuDriver(replace(rig.qemu.config, warm_pool_max=1))
    yield driver
    await driver.close()


async def waiting(rig: QemuRig, driver: QemuDriver, template: TemplateRef | None = None) -> Member:
    """Return the VM that the next fork will be given."""
    await prime_pool(driver, rig.spec, template or await rig.template(), rig.home / "machines")
    (member,) = (await driver._warm_pool())._waiting
    return member


def started_how(vm: Vm) -> str:
    assert isinstance(vm, QemuVm)
    return vm.about_memory()["start"]


async def kill_vmm(member: Member) -> None:
    """Kill QEMU; returns when its keeper has cleaned up."""
    pids = read_pids(member.begun.layout)
    os.kill(pids["vmm"].pid, signal.SIGKILL)
    assert await wait_gone([pids["keeper"].pid], GONE_S) == []


async def serves(vm: Vm) -> None:
    assert await shell(vm.link, "echo fine > /root/word; sync; cat /root/word") == "fine"
    await vm.kill()


async def test_one_that_died_while_it_waited_is_not_taken(rig: QemuRig, driver: QemuDriver) -> None:
    await kill_vmm(await waiting(rig, driver))
    vm = await rig.fork(driver)
    assert started_how(vm) == STARTED
    await serves(vm)


async def test_a_keeper_that_was_killed_takes_its_vm_along(rig: QemuRig, driver: QemuDriver) -> None:
    """And its folder, which it cannot remove any more, goes with the pool."""
    member = await waiting(rig, driver)
    pids = read_pids(member.begun.layout)
    os.kill(pids["keeper"].pid, signal.SIGKILL)
    assert await wait_gone([pids["keeper"].pid, pids["vmm"].pid], GONE_S) == []
    vm = await rig.fork(driver)
    assert started_how(vm) == STARTED
    await serves(vm)


@pytest.mark.parametrize("moment", ["asked", "renamed"])
async def test_one_that_dies_while_it_is_taken_is_replaced(
    rig: QemuRig, driver: QemuDriver, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The same restore starts another."""
    member = await waiting(rig, driver)
    if moment == "asked":
        real = Member.become

        async def become(self: Member, *args: Any) -> None:
            await kill_vmm(self)
            await real(self, *args)

        monkeypatch.setattr(Member, "become", become)
    else:
        real_thread = pool_member.in_thread

        async def in_thread(work: Any, *args: Any) -> Any:
            if work == member._rename:
                await kill_vmm(member)
            return await real_thread(work, *args)

        monkeypatch.setattr(pool_member, "in_thread", in_thread)
    vm = await rig.fork(driver)
    assert started_how(vm) == STARTED
    await serves(vm)


async def test_one_that_dies_once_it_is_taken_fails_the_restore(
    rig: QemuRig, driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any VM would: a typed error, and nothing left."""
    await waiting(rig, driver)
    real = Member.become

    async def become(self: Member, *args: Any) -> None:
        await real(self, *args)
        await kill_vmm(self)

    monkeypatch.setattr(Member, "become", become)
    vm_id, directory = rig.machine()
    ref = await rig.template()
    with pytest.raises(DriverFailed):
        await driver.restore(
            vm_id, rig.spec, RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes()), directory
        )
    await driver.close()
    assert rig.leftovers() == []


async def test_a_cancelled_restore_leaves_nothing_of_it(
    rig: QemuRig, driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled right when the run folder has been renamed."""
    member = await waiting(rig, driver)
    pids = [process.pid for process in read_pids(member.begun.layout).values()]
    restore = asyncio.ensure_future(rig.fork(driver))
    real = member._rename
    loop = asyncio.get_running_loop()

    def rename(*args: Any) -> None:
        real(*args)
        loop.call_soon_threadsafe(restore.cancel)

    monkeypatch.setattr(member, "_rename", rename)
    with pytest.raises(asyncio.CancelledError):
        await restore
    assert await wait_gone(pids, GONE_S) == []
    await driver.close()
    assert rig.leftovers() == []


async def test_a_vm_that_cannot_wait_leaves_nothing(
    rig: QemuRig, driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start fails when everything of it is there already; restores go their own way."""

    async def full(_qmp: Any) -> None:
        raise OutOfSpace("no room for a VM that waits")

    with monkeypatch.context() as patch:
        patch.setattr(pool_member, "track_disk", full)
        await prime_pool(driver, rig.spec, await rig.template(), rig.home / "machines")
    assert (await driver.kept_ready()).waiting == 0
    assert rig.leftovers() == []
    assert list((rig.qemu.run_dir / FOLDER).iterdir()) == []
    vm = await rig.fork(driver)
    assert started_how(vm) == STARTED
    await serves(vm)


async def test_a_removed_template_takes_those_that_wait_along(rig: QemuRig, driver: QemuDriver, tmp_path: Path) -> None:
    """They hold its memory's file, which would not be given back."""
    real = await rig.template()
    folder = tmp_path / "template"
    folder.mkdir()
    for name in ("ram", "disk", "vmstate"):
        shutil.copy(getattr(real, name), folder / name)
    ref = TemplateRef("short-lived", folder / "ram", folder / "disk", folder / "vmstate")
    member = await waiting(rig, driver, ref)
    pids = [process.pid for process in read_pids(member.begun.layout).values()]
    assert (await driver.kept_ready()).memory_bytes > 0
    shutil.rmtree(folder)
    (await driver._warm_pool())._look()
    assert await wait_gone(pids, GONE_S) == []
    assert (await driver.kept_ready()).waiting == 0


@pytest.mark.parametrize("where", ["waiting", "taking", "taken", "running"])
async def test_the_server_is_killed(rig: QemuRig, where: str) -> None:
    """While a VM waits, before it is the machine's, after that, and when its journal says that it runs: it ends with the
    server that alone knew of it, and the next server finds no machine."""
    directory = rig.home / "machines" / "lost"
    await lose_server(rig, directory, where)
    left = [one.pid for one in processes_of(rig.qemu.run_dir)]
    assert await wait_gone(left, GONE_S) == []
    next_one = QemuDriver(replace(rig.qemu.config, warm_pool_max=1))
    try:
        assert await next_one.adopt("lost", directory) is None
        assert (await next_one.kept_ready()).waiting == 0
        assert rig.leftovers() == []
        vm = await rig.fork(next_one)
        await serves(vm)
    finally:
        await next_one.close()


async def lose_server(rig: QemuRig, directory: Path, where: str) -> None:
    """Run a server that dies there."""
    ref = await rig.template()
    script = Path(__file__).parents[1] / "machines" / "dying_server.py"
    places = [rig.qemu.run_dir, rig.qemu.config.home, ref.ram.parent, directory]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), *map(str, places), where, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == -9, errors.decode()
    with contextlib.suppress(FileNotFoundError):  # its name was given, or it never had one
        (directory / "disk.raw").unlink()
