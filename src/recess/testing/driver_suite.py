"""The conformance suite of drivers: subclass `DriverSuite`, give it a `rig` fixture, and run it.

Every test gets a VM in each of its ways of life: booted, forked from a template, restored from a capture of a fork.
What a machine must keep is checked in the guest: a nonce that only its memory holds, its boot id, files, a process
that goes on. Guests need `sh`, `cat`, `echo`, `wc`, `sleep` and `/dev/shm`, nothing else.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from recess.errors import Corrupt, IllegalState, RecessError, Unsupported
from recess.guestlink.link import ExecRequest, GuestLink, Thaw, WakeUp
from recess.machines.contract import DISK_NAME, Capture, Driver, PageSet, RestoreParts, TemplateRef, Vm, VmSpec
from recess.units import PAGE_BYTES

LIVES = ("booted", "forked", "restored")
NO_PAGES = PageSet(memoryview(b""), memoryview(b""))

_numbers = itertools.count(1)


_THAW_S = 30.0


def new_thaw() -> Thaw:
    """Return what a machine is told when it wakes."""
    name = secrets.token_hex(4)
    return Thaw(time.time_ns(), os.urandom(32), name, 1, f"m-{name}", secrets.token_hex(16))


async def shell(link: GuestLink, script: str) -> str:
    """Run a shell script in the guest to its end and return what it wrote; it must succeed."""
    job = await link.exec(ExecRequest(["sh", "-c", script]))
    out = b"".join([data async for _stream, data in job.output()])
    code = await job.wait()
    assert code == 0, f"{script!r} ended with {code}: {out.decode(errors='replace')}"
    return out.decode().strip()


async def lines(link: GuestLink, path: str) -> int:
    """Return how many lines a guest's file has."""
    return int((await shell(link, f"wc -l < {path}")).split()[0])


def copy_pages(pages: PageSet) -> PageSet:
    """Return the same pages in memory of their own, as they come back from a store."""
    return PageSet(memoryview(bytes(pages.indices)), memoryview(bytes(pages.data)))


def merge_pages(older: PageSet, newer: PageSet) -> PageSet:
    """Return the pages of both as one set; where both have one, the newer."""
    pages: dict[int, bytes] = {}
    for part in (older, newer):
        numbers = np.frombuffer(part.indices, "<u4")
        data = np.frombuffer(part.data, np.uint8).reshape(len(numbers), PAGE_BYTES)
        pages |= {int(number): page.tobytes() for number, page in zip(numbers, data, strict=True)}
    numbers = np.array(sorted(pages), "<u4")
    return PageSet(memoryview(numbers.tobytes()), memoryview(b"".join(pages[int(n)] for n in numbers)))


@dataclass
class Rig(abc.ABC):
    """What the suite needs of a driver. `home` is an empty folder of the test's own."""

    home: Path
    spec: VmSpec

    @abc.abstractmethod
    def make_driver(self) -> Driver:
        """Return a new driver object over the same run folder, as a restarted server has it."""

    @abc.abstractmethod
    async def template(self) -> TemplateRef:
        """Return the template of `spec`; may be made on first use and kept for all tests."""

    @abc.abstractmethod
    def make_disk(self, directory: Path) -> None:
        """Put a formatted writable disk into a machine's directory."""

    @abc.abstractmethod
    def leftovers(self) -> list[str]:
        """Return what is left of machines on this host: processes, sockets, files; empty when all were killed."""

    @abc.abstractmethod
    async def lose(self, vm: Vm) -> None:
        """Let go of a VM as a server that dies does: without ending it."""

    def machine(self) -> tuple[str, Path]:
        """Return a fresh VM id and its directory."""
        number = next(_numbers)
        return f"mch_{os.getpid()}x{number}", self.home / "machines" / str(number)

    async def boot(self, driver: Driver) -> Vm:
        """Return a booted VM, thawed."""
        vm_id, directory = self.machine()
        directory.mkdir(parents=True)
        self.make_disk(directory)
        vm = await driver.boot(vm_id, self.spec, directory)
        await vm.link.thaw(new_thaw())
        return vm

    async def fork(self, driver: Driver) -> Vm:
        """Return a fork of the template, thawed by a request of its own."""
        ref = await self.template()
        parts = RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes())
        vm_id, directory = self.machine()
        vm = await driver.restore(vm_id, self.spec, parts, directory)
        await vm.link.thaw(new_thaw())
        return vm

    async def restore(self, driver: Driver, parts: RestoreParts) -> Vm:
        """Return a restored VM, thawed by its hello if the driver sends a thaw along."""
        return await self.restore_told(driver, parts, new_thaw())

    async def restore_told(self, driver: Driver, parts: RestoreParts, thaw: Thaw) -> Vm:
        """Return a restored VM, thawed by this."""
        vm_id, directory = self.machine()
        wake = WakeUp(lambda: thaw)
        vm = await driver.restore(vm_id, self.spec, replace(parts, wake=wake), directory)
        await (vm.link.thaw(thaw) if wake.answer is None else wake.answer(_THAW_S))
        return vm

    async def parts_of(self, capture: Capture) -> RestoreParts:
        """Return a capture's content as it would come back from a store; the capture is closed."""
        template = await self.template() if capture.base == "template" else None
        parts = RestoreParts(template, copy_pages(capture.memory), copy_pages(capture.disk), capture.vmstate)
        capture.close()
        return parts

    async def live(self, driver: Driver, life: str) -> Vm:
        """Return a VM that came about in this way."""
        if life == "booted":
            return await self.boot(driver)
        vm = await self.fork(driver)
        if life == "restored":
            parts = await self.parts_of(await quiet_capture(vm, resume=False))
            await vm.kill()
            thaw = new_thaw()
            vm = await self.restore_told(driver, parts, thaw)
            told = await shell(vm.link, "cat /run/recess/generation")
            assert told == thaw.generation, f"it was not thawed by its own thaw: {told}"
        return vm


async def quiet_capture(vm: Vm, *, resume: bool, parent: str = "", disk_too: bool = False) -> Capture:
    """Capture as the machines room does: the workload frozen before the pause, let go after it."""
    await vm.link.freeze()
    try:
        return await vm.capture(resume=resume, parent=parent, disk_too=disk_too)
    finally:
        if resume:
            await vm.link.unfreeze()


def check_page_set(pages: PageSet, total: int) -> None:
    """Check a page set's form: ascending numbers inside the part, a page of data each."""
    numbers = np.frombuffer(pages.indices, "<u4").astype(np.int64)
    assert len(numbers) == pages.count
    assert pages.data.nbytes == pages.count * PAGE_BYTES
    assert bool((np.diff(numbers) > 0).all())
    assert not len(numbers) or numbers[-1] < total


class DriverSuite:
    """What every driver with the capabilities snapshot, fork and live_snapshot must do."""

    @pytest.fixture
    def driver(self, rig: Rig) -> Driver:
        return rig.make_driver()

    @pytest.fixture(params=LIVES)
    async def vm(self, rig: Rig, driver: Driver, request: pytest.FixtureRequest) -> AsyncIterator[Vm]:
        vm = await rig.live(driver, request.param)
        yield vm
        await vm.kill()
        assert rig.leftovers() == []

    async def test_a_life(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """Exec, a nonce in memory, files, a process that goes on, over a live capture and a restore from it."""
        nonce = secrets.token_hex(8)
        boot_id = await shell(vm.link, "cat /proc/sys/kernel/random/boot_id")
        await shell(vm.link, f"echo {nonce} > /dev/shm/nonce; echo kept-{nonce} > /root/file")
        script = "while true; do echo tick >> /dev/shm/ticks; sleep 0.05; done"
        job = await vm.link.exec(ExecRequest(["sh", "-c", script], job_id="ticker"))
        pid = job.pid
        await job.detach()

        capture = await quiet_capture(vm, resume=True)
        assert capture.standstill_s > 0
        check_page_set(capture.memory, capture.memory_pages_total)
        check_page_set(capture.disk, capture.disk_blocks_total)
        assert capture.fingerprint == await driver.fingerprint(rig.spec)
        parts = await rig.parts_of(capture)

        await shell(vm.link, "echo after > /root/file; echo gone > /dev/shm/nonce")  # the parent goes on
        child = await rig.restore(driver, parts)
        try:
            assert await shell(child.link, "cat /dev/shm/nonce /root/file") == f"{nonce}\nkept-{nonce}"
            assert await shell(child.link, "cat /proc/sys/kernel/random/boot_id") == boot_id
            jobs = {j.job_id: j for j in await child.link.jobs()}
            assert (jobs["ticker"].pid, jobs["ticker"].exit_code) == (pid, None)
            before = await lines(child.link, "/dev/shm/ticks")
            await shell(child.link, "sleep 0.3")
            assert await lines(child.link, "/dev/shm/ticks") > before
            assert await shell(vm.link, "cat /dev/shm/nonce /root/file") == "gone\nafter"
        finally:
            await child.kill()

    async def test_disk_and_memory_are_of_one_instant(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """A file that is overwritten right after the pause comes back as it was in the pause, from the disk itself."""
        await shell(vm.link, "echo old > /root/state; sync")
        await vm.link.freeze(sync=True)
        capture = await vm.capture(resume=True)
        await vm.link.unfreeze()
        await shell(vm.link, "echo new > /root/state; sync")
        parts = await rig.parts_of(capture)
        child = await rig.restore(driver, parts)
        try:
            await shell(child.link, "echo 3 > /proc/sys/vm/drop_caches || true")
            assert await shell(child.link, "cat /root/state") == "old"
            # a second generation: blocks of the first restore that nobody wrote since must still be there
            parts = await rig.parts_of(await quiet_capture(child, resume=False))
        finally:
            await child.kill()
        grandchild = await rig.restore(driver, parts)
        try:
            await shell(grandchild.link, "echo 3 > /proc/sys/vm/drop_caches || true")
            assert await shell(grandchild.link, "cat /root/state") == "old"
        finally:
            await grandchild.kill()

    async def test_captured_twice_and_left_paused(self, vm: Vm) -> None:
        """Captures don't wear a VM out; one that leaves it paused is ended by unpause."""
        await shell(vm.link, "echo 1 > /dev/shm/x")
        (await quiet_capture(vm, resume=True)).close()
        await shell(vm.link, "echo 2 > /dev/shm/x")
        await vm.link.freeze()
        capture = await vm.capture(resume=False)
        assert capture.standstill_s == 0.0
        capture.close()
        capture.close()
        await vm.unpause()
        await vm.link.unfreeze()
        assert await shell(vm.link, "cat /dev/shm/x") == "2"

    async def test_a_capture_counts_from_the_stored_snapshot(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """With dirty tracking: only what was written since; nothing is lost that was never stored; also after a new
        server took over, and in a machine that was restored from that snapshot."""
        if not driver.capabilities.dirty_tracking:
            assert (await quiet_capture(vm, resume=True, parent="snp_a")).parent == ""
            return
        await shell(vm.link, "echo 1 > /dev/shm/a")
        first = await quiet_capture(vm, resume=True, parent="snp_a")
        assert first.parent == ""  # nobody has said yet that it was stored
        await shell(vm.link, "echo 2 > /dev/shm/b")
        await vm.committed(first, "snp_a")
        whole = await rig.parts_of(first)
        (await quiet_capture(vm, resume=True, parent="snp_a")).close()  # never stored
        await rig.lose(vm)
        adopted = await rig.make_driver().adopt(vm.id, self.directory_of(rig, vm))
        assert adopted is not None
        try:
            await shell(adopted.link, "echo 3 > /dev/shm/c")
            await shell(adopted.link, "echo 4 > /root/d; sync")
            second = await quiet_capture(adopted, resume=True, parent="snp_a", disk_too=True)
            assert second.parent == "snp_a"
            assert second.disk_parent in ("snp_a", "")
            parts = self.over(whole, second, await rig.parts_of(second))
            await adopted.committed(first, "snp_late")  # too late: another capture was made since
            other = await quiet_capture(adopted, resume=True, parent="snp_late")
            assert other.parent == ""
            other.close()
        finally:
            await adopted.kill()
        child = await rig.restore(driver, replace(parts, snapshot="snp_b"))
        try:
            assert await shell(child.link, "cat /dev/shm/a /dev/shm/b /dev/shm/c /root/d") == "1\n2\n3\n4"
            await shell(child.link, "echo 5 > /root/e; sync")
            third = await quiet_capture(child, resume=False, parent="snp_b", disk_too=True)
            assert third.parent == "snp_b"
            last = self.over(parts, third, await rig.parts_of(third))
        finally:
            await child.kill()
        grandchild = await rig.restore(driver, last)
        await shell(grandchild.link, "echo 3 > /proc/sys/vm/drop_caches || true")
        files = "/dev/shm/a /dev/shm/b /dev/shm/c /root/d /root/e"
        assert await shell(grandchild.link, f"cat {files}") == "1\n2\n3\n4\n5"
        await grandchild.kill()

    @staticmethod
    def over(older: RestoreParts, capture: Capture, parts: RestoreParts) -> RestoreParts:
        """Return a capture's parts over those of the snapshot that it counts from."""
        blocks = merge_pages(older.disk, parts.disk) if capture.disk_parent else parts.disk
        return replace(parts, memory=merge_pages(older.memory, parts.memory), disk=blocks)

    async def test_pause_holds_the_guest(self, vm: Vm) -> None:
        """A paused VM does not answer; both moves may be repeated."""
        await vm.pause()
        await vm.pause()
        with pytest.raises(RecessError):
            await vm.link.ping(timeout_s=0.3)
        await vm.unpause()
        await vm.unpause()
        assert await shell(vm.link, "echo awake") == "awake"

    async def test_a_new_server_takes_over(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """Another driver object finds the VM, speaks to the same guest, and can do everything with it."""
        await shell(vm.link, "echo here > /dev/shm/who")
        assert vm.id in driver.list_leftovers()
        await rig.lose(vm)
        second = rig.make_driver()
        adopted = await second.adopt(vm.id, self.directory_of(rig, vm))
        assert adopted is not None
        try:
            assert adopted.id == vm.id
            assert await shell(adopted.link, "cat /dev/shm/who") == "here"
            parts = await rig.parts_of(await quiet_capture(adopted, resume=True))
            await adopted.set_deadline(60.0)
        finally:
            await adopted.kill()
        child = await rig.restore(second, parts)
        assert await shell(child.link, "cat /dev/shm/who") == "here"
        await child.kill()
        assert vm.id not in second.list_leftovers()
        assert await second.adopt(vm.id, self.directory_of(rig, vm)) is None

    async def test_a_new_server_takes_over_a_paused_machine(self, rig: Rig, vm: Vm) -> None:
        """It is still paused; unpausing it brings its link back, too."""
        await shell(vm.link, "echo here > /dev/shm/who")
        await vm.pause()
        await rig.lose(vm)
        adopted = await rig.make_driver().adopt(vm.id, self.directory_of(rig, vm))
        assert adopted is not None
        try:
            await adopted.unpause()
            assert await shell(adopted.link, "cat /dev/shm/who") == "here"
        finally:
            await adopted.kill()

    async def test_the_deadline_kills(self, vm: Vm) -> None:
        """A deadline that is set again holds off the end; one that passes ends the VM without the server's help."""
        await vm.set_deadline(0.3)
        await vm.set_deadline(None)
        dead = asyncio.ensure_future(vm.wait_dead())
        await asyncio.sleep(0.5)
        assert not dead.done()
        await vm.set_deadline(0.05)
        assert "deadline" in await asyncio.wait_for(dead, 10)
        with pytest.raises(RecessError):
            await vm.capture(resume=True)

    async def test_kill_leaves_nothing(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """After kill there is nothing, whoever waits is told, and a second kill is no error."""
        stats = await vm.stats()
        assert stats.pss_bytes > 0
        assert stats.private_bytes > 0
        assert len(vm.console_tail(10)) <= 10
        waiting = asyncio.ensure_future(vm.wait_dead())
        await vm.kill()
        assert await asyncio.wait_for(waiting, 5)
        assert rig.leftovers() == []
        assert list(driver.list_leftovers()) == []
        await vm.kill()

    async def test_its_disk_boots_again_after_its_end(self, rig: Rig, driver: Driver, vm: Vm) -> None:
        """Rung 4: what was synced is there after a cold boot from the disk of a VM that died, or was killed; its memory
        is not. A hard link keeps the disk over `kill`."""
        directory = self.directory_of(rig, vm)
        if not driver.capabilities.own_disk:
            capture = await quiet_capture(vm, resume=True)
            assert capture.disk.count == 0  # nothing that rung 4 could take for the machine's files
            capture.close()
            return
        await shell(vm.link, "echo kept > /root/file; echo gone > /dev/shm/nonce; sync")
        boot_id = await shell(vm.link, "cat /proc/sys/kernel/random/boot_id")
        await vm.set_deadline(0.0)
        await asyncio.wait_for(vm.wait_dead(), 10)
        os.link(directory / DISK_NAME, rig.home / "kept")
        await vm.kill()
        os.link(rig.home / "kept", directory / DISK_NAME)
        second = await driver.boot(vm.id, rig.spec, directory)
        try:
            await second.link.thaw(new_thaw())
            assert (
                await shell(second.link, "cat /root/file; test -e /dev/shm/nonce || echo forgotten")
                == "kept\nforgotten"
            )
            assert await shell(second.link, "cat /proc/sys/kernel/random/boot_id") != boot_id
            await shell(second.link, "echo again > /root/file; sync")
            parts = await rig.parts_of(await quiet_capture(second, resume=True))
            assert parts.template is None
        finally:
            await second.kill()
        assert not (directory / DISK_NAME).exists()
        third = await rig.restore(driver, parts)
        try:
            assert await shell(third.link, "cat /root/file") == "again"
        finally:
            await third.kill()
        os.link(rig.home / "kept", directory / DISK_NAME)
        fourth = await driver.boot(vm.id, rig.spec, directory)
        try:
            await fourth.link.thaw(new_thaw())
            assert await shell(fourth.link, "cat /root/file") == "again"
        finally:
            await fourth.kill()

    async def test_what_runs_or_is_paused_is_not_stalled(self, vm: Vm) -> None:
        """A stall is the host's doing; going on without one changes nothing, and the wait for one ends with the VM."""
        waiting = asyncio.ensure_future(vm.wait_stalled())
        assert await vm.stalled() == ""
        await vm.pause()
        assert await vm.stalled() == ""
        await vm.go_on()
        with pytest.raises(RecessError):
            await vm.link.ping(timeout_s=0.3)
        await vm.unpause()
        assert await shell(vm.link, "echo awake") == "awake"
        assert not waiting.done()
        await vm.kill()
        with pytest.raises(RecessError):
            await asyncio.wait_for(waiting, 10)

    async def test_only_a_template_is_exported(self, vm: Vm, rig: Rig) -> None:
        """A machine in use cannot become a template."""
        with pytest.raises(IllegalState):
            await vm.export_template(rig.home / "template")
        assert await shell(vm.link, "echo alive") == "alive"

    async def test_forks_share_nothing_they_write(self, rig: Rig, driver: Driver) -> None:
        """Two forks of one template go different ways and leave the template as it was."""
        ref = await rig.template()
        before = ref.disk.read_bytes() if ref.disk.stat().st_size < 1 << 26 else b""
        one, two = await asyncio.gather(rig.fork(driver), rig.fork(driver))
        try:
            await asyncio.gather(shell(one.link, "echo 1 > /root/n; sync"), shell(two.link, "echo 2 > /root/n; sync"))
            assert await shell(one.link, "cat /root/n") == "1"
            assert await shell(two.link, "cat /root/n") == "2"
            three = await rig.fork(driver)
            try:
                assert await shell(three.link, "test -e /root/n || echo clean") == "clean"
            finally:
                await three.kill()
        finally:
            await asyncio.gather(one.kill(), two.kill())
        if before:
            assert ref.disk.read_bytes() == before

    async def test_a_wrong_device_state_is_refused(self, rig: Rig, driver: Driver) -> None:
        """Garbage for a device state is a typed error, and nothing of the VM is left."""
        ref = await rig.template()
        vm_id, directory = rig.machine()
        with pytest.raises(RecessError):
            await driver.restore(vm_id, rig.spec, RestoreParts(ref, NO_PAGES, NO_PAGES, b"\0" * 64), directory)
        assert rig.leftovers() == []

    async def test_a_network_card_if_it_is_claimed(self, rig: Rig, driver: Driver) -> None:
        """A machine has one besides its loopback; else a typed error, at a boot and at a restore, before anything is made."""
        spec = replace(rig.spec, network="full")
        if driver.capabilities.network_full:
            vm = await replace(rig, spec=spec).boot(driver)
            try:
                assert await shell(vm.link, "ls /sys/class/net | grep -vcx lo") == "1"
            finally:
                await vm.kill()
            assert rig.leftovers() == []
            return
        ref = await rig.template()
        vm_id, directory = rig.machine()
        directory.mkdir(parents=True)
        rig.make_disk(directory)
        with pytest.raises(Unsupported):
            await driver.boot(vm_id, spec, directory)
        (directory / DISK_NAME).unlink()  # the caller's, who made it
        with pytest.raises(Unsupported):
            await driver.restore(
                vm_id, spec, RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes()), directory
            )
        assert list(directory.iterdir()) == []
        assert rig.leftovers() == []

    async def test_a_restore_begins_before_its_parts_are_read(self, rig: Rig, driver: Driver) -> None:
        """Parts that come later make the same VM; parts that turn out unreadable leave nothing of one."""
        if not driver.capabilities.early_start:
            pytest.skip(f"{driver.name} starts with whole parts only")
        first = await rig.fork(driver)
        await first.link.write_file("/root/kept", b"kept")
        whole = await rig.parts_of(await quiet_capture(first, resume=False))
        await first.kill()
        rest: asyncio.Future[RestoreParts] = asyncio.get_running_loop().create_future()
        early = RestoreParts(whole.template, NO_PAGES, NO_PAGES, b"", rest=rest)
        asyncio.get_running_loop().call_later(0.02, rest.set_result, whole)
        vm = await rig.restore(driver, early)
        try:
            assert await vm.link.read_file("/root/kept") == b"kept"
        finally:
            await vm.kill()
        bad: asyncio.Future[RestoreParts] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.02, bad.set_exception, Corrupt("a layer is damaged"))
        vm_id, directory = rig.machine()
        with pytest.raises(Corrupt):
            await driver.restore(vm_id, rig.spec, replace(early, rest=bad), directory)
        assert rig.leftovers() == []
        assert not (directory / DISK_NAME).exists()

    @staticmethod
    def directory_of(rig: Rig, vm: Vm) -> Path:
        """Return the directory that the rig gave this VM."""
        return rig.home / "machines" / vm.id.rsplit("x", 1)[1]
