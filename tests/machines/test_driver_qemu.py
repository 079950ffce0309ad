"""What is particular to QEMU: servers that die, ordinary users, a QEMU without the device command, what memory holds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recess.drivers.kept import disk
from recess.drivers.kept.cgroup import Groups, Limits
from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuDriver, QemuVm
from recess.errors import DriverFailed, InvalidSpec, MissingTool
from recess.machines.contract import DISK_NAME, RestoreParts
from recess.testing.driver_suite import NO_PAGES, lines, quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig
from recess.units import MIB, PAGE_BYTES
from tests.machines.ordinary_user import play_as_nobody

NOBODY = 65534


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> QemuRig:
    home = QemuHome.shared(images_dir)
    return QemuRig(home=tmp_path, spec=home.spec, qemu=home)


async def lose_server(rig: QemuRig, directory: Path, where: str) -> None:
    """Run a server that dies there."""
    ref = await rig.template()
    script = Path(__file__).with_name("dying_server.py")
    places = [rig.qemu.run_dir, rig.qemu.config.home, ref.ram.parent, directory]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), *map(str, places), where, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    _, errors = await process.communicate()
    assert process.returncode == -9, errors.decode()


@pytest.mark.parametrize("where", ["idle", "capture"])
async def test_a_killed_servers_machine_is_taken_over(
    rig: QemuRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also one that was stopped in the middle of a capture: it runs again, and can be captured. Its snapshots are of the QEMU
    that runs it, whatever the host has by now."""
    directory = tmp_path / "machine"
    await lose_server(rig, directory, where)
    driver, now = rig.make_driver(), await rig.make_driver().fingerprint(rig.spec)
    monkeypatch.setattr(driver, "_fingerprint", lambda _facts, _spec: replace(now, driver_version="99.0"))
    assert driver.list_leftovers() == ["lost"]
    vm = await driver.adopt("lost", directory)
    assert vm is not None
    try:
        assert await shell(vm.link, "cat /dev/shm/word") == "before"
        capture = await quiet_capture(vm, resume=True)
        assert capture.fingerprint == now
        parts = await rig.parts_of(capture)
    finally:
        await vm.kill()
    child = await rig.restore(driver, parts)
    assert await shell(child.link, "cat /dev/shm/word") == "before"
    await child.kill()
    assert rig.leftovers() == []


async def test_a_machine_whose_qemu_was_removed_does_not_run_on(rig: QemuRig, tmp_path: Path) -> None:
    """Nobody could take it over, and its row falls; its disk can still be booted."""
    directory = tmp_path / "machine"
    await lose_server(rig, directory, "idle")
    driver = QemuDriver(replace(rig.qemu.config, qemu_bin="/gone"))
    with pytest.raises(MissingTool):
        await driver.adopt("lost", directory)
    assert list(driver.list_leftovers()) == []
    assert (directory / DISK_NAME).is_file()
    (directory / DISK_NAME).unlink()
    assert rig.leftovers() == []


async def test_a_half_made_machine_is_not_taken_over(rig: QemuRig, tmp_path: Path) -> None:
    directory = tmp_path / "machine"
    await lose_server(rig, directory, "restore")
    driver = rig.make_driver()
    assert await driver.adopt("lost", directory) is None
    assert rig.leftovers() == []


async def test_the_capture_holds_every_page_that_changed(rig: QemuRig) -> None:
    """Template and captured pages together are the memory, byte for byte, as QEMU's own dump shows it."""
    vm = await rig.fork(rig.make_driver())
    try:
        await shell(vm.link, "head -c 6000000 /dev/urandom > /dev/shm/noise")
        await vm.link.freeze()
        capture = await vm.capture(resume=False)
        ref = await rig.template()
        rebuilt = np.fromfile(ref.ram, np.uint8).reshape(-1, PAGE_BYTES)
        indices, data = disk.as_arrays(capture.memory)
        rebuilt[indices] = data
        assert isinstance(vm, QemuVm)
        memory = Path(f"/proc/{read_pids(vm._handles.layout)['vmm'].pid}/mem")
        start = ram_address(vm, ref.ram)
        with memory.open("rb", buffering=0) as handle:
            for page in range(0, len(rebuilt), 4096):
                handle.seek(start + page * PAGE_BYTES)
                assert handle.read(4096 * PAGE_BYTES) == rebuilt[page : page + 4096].tobytes()
        assert capture.memory.count * PAGE_BYTES < 40_000_000
        del indices, data
        capture.close()
    finally:
        await vm.kill()


def ram_address(vm: QemuVm, ram: Path) -> int:
    pid = read_pids(vm._handles.layout)["vmm"].pid
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(str(ram)):
            return int(line.split("-")[0], 16)
    raise AssertionError(f"{ram} is not mapped")


async def test_the_disk_is_copied_while_the_guest_writes_it(rig: QemuRig) -> None:
    """Blocks written while the copy goes on come back as they were at the pause: a file system in one piece."""
    driver = rig.make_driver()
    vm = await rig.fork(driver)
    script = "i=0; while true; do i=$((i+1)); echo $i >> /root/log; sync; done"
    try:
        await shell(vm.link, "head -c 20000000 /dev/urandom > /root/big; sync; sha256sum /root/big > /dev/shm/sum")
        await vm.link.exec(rig_job(script))
        await asyncio.sleep(0.3)
        parts = await rig.parts_of(await quiet_capture(vm, resume=True))
        assert await lines(vm.link, "/root/log") > 0
    finally:
        await vm.kill()
    child = await rig.restore(driver, parts)
    try:
        await shell(child.link, "echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /dev/shm/sum")
        count = await lines(child.link, "/root/log")
        assert count > 0
        assert await shell(child.link, f"head -n {count} /root/log | tail -n 1") == str(count)
        assert "error" not in (await shell(child.link, "dmesg | grep -i ext4 || true")).lower()
    finally:
        await child.kill()


def rig_job(script: str) -> object:
    from recess.guestlink.link import ExecRequest

    return ExecRequest(["sh", "-c", script])


async def test_without_the_device_command_a_migration_does(rig: QemuRig) -> None:
    """Template, fork, capture and restore on a QEMU that lacks `xen-save-devices-state`."""
    rig = replace(rig, devices_command=False)
    driver = rig.make_driver()
    assert (await driver.probe())["device_state"] == "migration"
    vm = await rig.fork(driver)
    try:
        await shell(vm.link, "echo kept > /dev/shm/word; echo disk > /root/word; sync")
        parts = await rig.parts_of(await quiet_capture(vm, resume=True))
        assert await shell(vm.link, "cat /dev/shm/word") == "kept"
    finally:
        await vm.kill()
    child = await rig.restore(driver, parts)
    try:
        assert await shell(child.link, "cat /dev/shm/word /root/word") == "kept\ndisk"
    finally:
        await child.kill()
    assert rig.leftovers() == []


async def test_its_system_calls_are_filtered(rig: QemuRig) -> None:
    """Every thread of a fork's QEMU runs under a filter, and may gain no rights (Linux: Seccomp 2, NoNewPrivs 1)."""
    vm = await rig.fork(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        pid = read_pids(vm._handles.layout)["vmm"].pid
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            said = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            assert (said["Seccomp"], said["NoNewPrivs"]) == ("2", "1"), status
    finally:
        await vm.kill()


async def test_the_host_may_not_merge_its_pages(rig: QemuRig) -> None:
    """No memory of a fork's QEMU is offered to KSM (proc_pid_smaps: `mg`)."""
    vm = await rig.fork(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        pid = read_pids(vm._handles.layout)["vmm"].pid
        flags = [ln.split()[1:] for ln in Path(f"/proc/{pid}/smaps").read_text().splitlines() if "VmFlags:" in ln]
        assert flags
        assert not [of_one for of_one in flags if "mg" in of_one]
    finally:
        await vm.kill()


async def test_it_runs_within_its_limits(rig: QemuRig) -> None:
    """A fork's QEMU, with all of its threads, is in a control group of its own, which ends with it."""
    groups = Groups.find()
    if groups.top is None:
        pytest.skip(groups.why)
    vm = await rig.fork(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        pid = read_pids(vm._handles.layout)["vmm"].pid
        (own,) = [path for path in groups.top.iterdir() if path.is_dir() and _members(path) == [str(pid)]]
        limits = Limits.of(rig.spec, 32 * MIB)
        assert (own / "memory.max").read_text().strip() == str(limits.memory_bytes)
        assert (own / "pids.max").read_text().strip() == str(limits.processes)
        assert 0 < int((own / "memory.peak").read_text()) < limits.memory_bytes // 2
    finally:
        await vm.kill()
    assert not own.exists()
    assert rig.leftovers() == []


def _members(group: Path) -> list[str]:
    return (group / "cgroup.procs").read_text().split()


async def test_the_budgets_are_in_reach(rig: QemuRig) -> None:
    """Not a benchmark: ten times the budget would mean that something is done inside the pause that must not be."""
    driver = rig.make_driver()
    vm = await rig.fork(driver)
    assert isinstance(vm, QemuVm)
    standstill = []
    for _ in range(3):
        capture = await quiet_capture(vm, resume=True)
        standstill.append(capture.standstill_s)
        capture.close()
    await vm.kill()
    assert min(standstill) < 0.25, standstill


async def test_what_cannot_be_started(rig: QemuRig, tmp_path: Path) -> None:
    driver = rig.make_driver()
    with pytest.raises(InvalidSpec, match="no disk"):
        await driver.boot("nodisk", rig.spec, tmp_path)
    (tmp_path / DISK_NAME).write_bytes(bytes(4096))
    with pytest.raises(InvalidSpec, match="4096 bytes"):
        await driver.boot("smalldisk", rig.spec, tmp_path)
    ref = await rig.template()
    gone = replace(ref, ram=tmp_path / "gone")
    with pytest.raises(DriverFailed, match="gone"):
        await driver.restore("gone", rig.spec, RestoreParts(gone, NO_PAGES, NO_PAGES, b"d"), tmp_path / "m")
    assert rig.leftovers() == []


def test_an_ordinary_user_can_do_all_of_it(images_dir: Path) -> None:
    """Boot, export, fork, capture, restore and adopt as a user without rights, which root becomes for it."""
    play_as_nobody("qemu", images_dir)
