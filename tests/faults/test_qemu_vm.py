"""QEMU and its keeper die, the disk is full, calls are cancelled: a typed error, and nothing is left."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recess.drivers.kept import disk
from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuDriver, QemuVm, capture, start
from recess.drivers.qemu.memory import MemoryCapture
from recess.errors import DriverFailed, GuestFailed, MissingTool, OutOfSpace, RecessError
from recess.guestlink.link import ExecRequest
from recess.machines.contract import RestoreParts, Vm
from recess.testing.driver_suite import NO_PAGES, quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig
from recess.testing.small_disk import small_disk

pytestmark = pytest.mark.machines


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> Iterator[QemuRig]:
    home = QemuHome.shared(images_dir)
    rig = QemuRig(home=tmp_path, spec=home.spec, qemu=home)
    yield rig
    assert rig.leftovers() == []


def kill_vmm(vm: Vm) -> None:
    assert isinstance(vm, QemuVm)
    os.kill(read_pids(vm._handles.layout)["vmm"].pid, signal.SIGKILL)


async def fork_parts(rig: QemuRig) -> RestoreParts:
    ref = await rig.template()
    return RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes())


async def test_qemu_is_missing(rig: QemuRig) -> None:
    driver = QemuDriver(replace(rig.qemu.config, qemu_bin="/nonexistent/qemu"))
    with pytest.raises(MissingTool) as caught:
        await driver.probe()
    assert "apt-get install" in caught.value.hint


async def test_the_keeper_is_missing(rig: QemuRig, tmp_path: Path) -> None:
    driver = QemuDriver(replace(rig.qemu.config, bin_dir=tmp_path))
    with pytest.raises(MissingTool, match="keeper"):
        await driver.fingerprint(rig.spec)


async def test_a_qemu_that_does_not_run(rig: QemuRig, tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\necho cannot load libfoo >&2\nexit 127\n")
    broken.chmod(0o755)
    driver = QemuDriver(replace(rig.qemu.config, qemu_bin=str(broken), accelerator="tcg"))
    with pytest.raises(DriverFailed) as caught:
        await driver.probe()
    assert "cannot load libfoo" in caught.value.details["log"]


async def test_qemu_dies_at_start(rig: QemuRig) -> None:
    """Its last words come with the error; the disk that the caller put there stays the caller's."""
    spec = replace(rig.spec, boot=replace(rig.spec.boot, root=Path("/nonexistent/root")))
    vm_id, directory = rig.machine()
    directory.mkdir(parents=True)
    rig.make_disk(directory)
    with pytest.raises(DriverFailed) as caught:
        await rig.make_driver().boot(vm_id, spec, directory)
    assert "/nonexistent/root" in caught.value.details["log"]
    assert (directory / "disk.raw").exists()
    (directory / "disk.raw").unlink()


async def test_a_guest_that_never_says_hello(rig: QemuRig) -> None:
    driver = QemuDriver(rig.qemu.config, boot_timeout_s=1.0)
    spec = replace(rig.spec, boot=replace(rig.spec.boot, initrd=rig.spec.boot.root))  # no init in there
    vm_id, directory = rig.machine()
    directory.mkdir(parents=True)
    rig.make_disk(directory)
    with pytest.raises(RecessError):
        await driver.boot(vm_id, spec, directory)
    (directory / "disk.raw").unlink()


async def test_the_device_state_is_damaged(rig: QemuRig) -> None:
    parts = await fork_parts(rig)
    state = bytearray(parts.vmstate)
    state[100:4000] = os.urandom(3900)
    vm_id, directory = rig.machine()
    with pytest.raises(RecessError):
        await rig.make_driver().restore(vm_id, rig.spec, replace(parts, vmstate=bytes(state)), directory)


@pytest.mark.parametrize("moment", ["load_state", "track_disk"])
async def test_qemu_dies_during_a_restore(rig: QemuRig, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    parts = await fork_parts(rig)
    vm_id, directory = rig.machine()
    real = getattr(start, moment)

    async def killed_first(*args: Any) -> None:
        pids = (rig.qemu.run_dir / "m" / vm_id / "pids").read_text()
        os.kill(int(pids.split("vmm ")[1].split()[0]), signal.SIGKILL)
        await real(*args)

    monkeypatch.setattr(start, moment, killed_first)
    with pytest.raises(DriverFailed):
        await rig.make_driver().restore(vm_id, rig.spec, parts, directory)


@pytest.mark.parametrize("victim", ["vmm", "keeper"])
async def test_it_dies_during_a_capture(rig: QemuRig, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    vm = await rig.fork(rig.make_driver())
    assert isinstance(vm, QemuVm)
    pid = read_pids(vm._handles.layout)[victim].pid
    real = capture.mark_capturing

    def killed_now(*args: Any) -> None:
        real(*args)
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(capture, "mark_capturing", killed_now)
    with pytest.raises(DriverFailed):
        await quiet_capture(vm, resume=False)
    assert await asyncio.wait_for(vm.wait_dead(), 5)
    await vm.kill()


async def test_a_killed_vm_is_reported_with_its_signal(rig: QemuRig) -> None:
    vm = await rig.fork(rig.make_driver())
    kill_vmm(vm)
    assert await asyncio.wait_for(vm.wait_dead(), 5) == "it ended by itself (signal 9)"
    with pytest.raises((DriverFailed, GuestFailed)):
        await vm.unpause()
    await vm.kill()


async def test_the_disk_is_full_before_a_capture(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await rig.fork(rig.make_driver())
    real = capture.shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(capture.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
        with pytest.raises(OutOfSpace):
            await quiet_capture(vm, resume=True)
    await goes_on(vm)


async def test_the_disks_copy_fails_half_way(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU cannot write its target (sealed memory): the job fails, the machine goes on, a later capture works."""
    vm = await rig.fork(rig.make_driver())
    await shell(vm.link, "head -c 3000000 /dev/urandom > /root/file; sync")
    real = capture._fill_target

    def sealed(handles: Any, plan: Any, target: int) -> Any:
        put_over = real(handles, plan, target)
        fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.truncate(fd, os.fstat(target).st_size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.dup2(fd, target, inheritable=False)
        os.close(fd)
        return put_over

    with monkeypatch.context() as patch:
        patch.setattr(capture, "_fill_target", sealed)
        with pytest.raises(DriverFailed, match="could not be copied"):
            await quiet_capture(vm, resume=False)
    await goes_on(vm)


async def goes_on(vm: Vm) -> None:
    """The machine runs, its disk is sound, and it can be captured."""
    await vm.link.unfreeze()
    await shell(vm.link, "echo fine > /root/after; sync; cat /root/after")
    (await quiet_capture(vm, resume=True)).close()
    assert await shell(vm.link, "cat /root/after") == "fine"
    await vm.kill()


@pytest.mark.mounts
async def test_the_disk_fills_up_while_it_is_copied(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy-before-write of a guest that writes meanwhile runs out of room: no guest write is lost."""

    async def trusting(*_args: Any) -> None:
        return

    with small_disk(rig.home / "small", 40 << 20) as small:
        vm = await rig.make_driver().restore("small", rig.spec, await fork_parts(rig), small / "machine")
        try:
            await vm.link.unfreeze()
            await shell(vm.link, "head -c 20000000 /dev/urandom > /root/file; sync; sha256sum /root/file > /root/sum")
            script = "while true; do dd if=/root/file of=/root/file conv=notrunc bs=1M 2>/dev/null; sync; done"
            await vm.link.exec(ExecRequest(["sh", "-c", script], job_id="writer"))
            with monkeypatch.context() as patch:
                patch.setattr(capture, "_check_space", trusting)
                with pytest.raises(OutOfSpace):
                    await quiet_capture(vm, resume=True)
            await vm.link.unfreeze()
            await (await vm.link.attach("writer")).signal(signal.SIGKILL)
            await shell(vm.link, "sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /root/sum")
            assert "error" not in (await shell(vm.link, "dmesg | grep -i 'I/O error' || true"))
        finally:
            await vm.kill()


@pytest.mark.mounts
async def test_a_truly_full_disk(rig: QemuRig) -> None:
    """Restore and capture on a disk without room: typed, nothing left, and the machine goes on."""
    driver = rig.make_driver()
    parts = await fork_parts(rig)
    with small_disk(rig.home / "small", 24 << 20) as small:
        vm = await driver.restore("small", rig.spec, parts, small / "machine")
        try:
            await vm.link.unfreeze()
            await shell(vm.link, "head -c 12000000 /dev/urandom > /root/file; sync")
            with pytest.raises(OutOfSpace):
                await quiet_capture(vm, resume=True)
            await vm.link.unfreeze()
            assert await shell(vm.link, "rm /root/file; sync; echo fine") == "fine"
        finally:
            await vm.kill()
        blocks = disk.PageSet(memoryview(bytes(8192 * 4)), memoryview(b"x" * (8192 * 4096)))
        numbers = b"".join(n.to_bytes(4, "little") for n in range(8192))
        blocks = replace(blocks, indices=memoryview(numbers))
        with pytest.raises(OutOfSpace):
            await driver.restore("small2", rig.spec, replace(parts, disk=blocks), small / "machine2")
        assert not list(small.glob("*/disk*"))


@pytest.mark.parametrize("after", ["prepare", "take", "collect"])
async def test_a_cancelled_capture_leaves_the_machine_running(
    rig: QemuRig, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    vm = await rig.fork(rig.make_driver())
    reached = asyncio.Event()

    async def hang(*_args: Any) -> Any:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(MemoryCapture, after, hang)
        task = asyncio.ensure_future(vm.capture(resume=False))
        await asyncio.wait_for(reached.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await goes_on(vm)


async def test_a_cancelled_restore_leaves_nothing(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = asyncio.Event()

    async def hang(*_args: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(start, "load_state", hang)
    vm_id, directory = rig.machine()
    task = asyncio.ensure_future(rig.make_driver().restore(vm_id, rig.spec, await fork_parts(rig), directory))
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
