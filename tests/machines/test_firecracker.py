"""What is particular to Firecracker: memory that comes by page faults, a list of changes that is lost, servers that die.

Where RECESS_FIRECRACKER_BIN names a binary and KVM may be opened; `tests/kvm_host` makes such a place.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from recess.blobs import LocalBlobs
from recess.drivers.firecracker import FirecrackerVm, start
from recess.drivers.firecracker.handles import family
from recess.drivers.firecracker.ledger import is_poisoned
from recess.drivers.kept.cgroup import Groups
from recess.drivers.kept.keeper import read_pids, wait_gone
from recess.errors import RecessError
from recess.machines.contract import PageSet, RestoreParts, TemplateRef, Vm
from recess.machines.mapped import DISK, MEMORY, MappedTemplate, capture_parts, to_pages
from recess.node.pagers import Pager, Pagers
from recess.snapshots import SnapshotMeta, Store
from recess.testing.crash import crashing
from recess.testing.driver_suite import NO_PAGES, quiet_capture, shell
from recess.testing.firecracker_rig import FirecrackerHome, FirecrackerRig, why_no_firecracker
from recess.units import GIB, MIB, PAGE_BYTES

FILL = "head -c 8000000 /dev/urandom > /dev/shm/big; sha256sum /dev/shm/big > /dev/shm/sum; echo 1 > /dev/shm/n"
CHECK = "sha256sum -c /dev/shm/sum > /dev/null && echo fine"
META = SnapshotMeta(fingerprint={}, spec={})


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> FirecrackerRig:
    if why := why_no_firecracker():
        pytest.skip(why)
    home = FirecrackerHome.shared(images_dir)
    return FirecrackerRig(home=tmp_path, spec=home.spec, firecracker=home)


async def test_the_host_runs_guests(rig: FirecrackerRig) -> None:
    found = await rig.make_driver().probe(fresh=True)
    assert (found["driver"], found["accelerator"], found["why"]) == ("firecracker", "kvm", "it ran a guest")
    assert rig.leftovers() == []


@dataclass
class Room:
    """A store with one snapshot of a machine that holds 8 MB of noise, and what restores it."""

    rig: FirecrackerRig
    store: Store
    pagers: Pagers
    ref: TemplateRef
    template: MappedTemplate
    snapshot: str = ""

    async def restore(self) -> tuple[Vm, Pager]:
        async def read_all() -> PageSet:
            return to_pages(self.store.overlay(self.snapshot, MEMORY, template=self.template))

        pager = await self.pagers.make(self.snapshot, MEMORY, self.ref.ram, {}, read_all)
        disk = to_pages(self.store.overlay(self.snapshot, DISK, template=self.template))
        state = self.store.vmstate(self.snapshot)
        parts = RestoreParts(self.ref, NO_PAGES, disk, state, self.snapshot, lazy=pager, choice="lazy: a test")
        try:
            return await self.rig.restore(self.rig.make_driver(), parts), pager
        except BaseException:
            await pager.close()
            raise


@pytest.fixture
async def room(rig: FirecrackerRig, tmp_path: Path) -> AsyncIterator[Room]:
    config = replace(rig.firecracker.config, home=tmp_path / "home")
    store, pagers = Store(LocalBlobs(config.blobs_dir)), Pagers(config)
    ref = await rig.template()
    room = Room(rig, store, pagers, ref, MappedTemplate.of(replace(ref, id="snp_" + "0" * 64)))
    vm = await rig.fork(rig.make_driver())
    try:
        await shell(vm.link, FILL)
        capture = await quiet_capture(vm, resume=False)
        report = await asyncio.to_thread(
            lambda: store.write(capture_parts(capture), capture.vmstate, META, template=room.template)
        )
        capture.close()
        room.snapshot = report.snapshot_id
    finally:
        await vm.kill()
    yield room
    pagers.close()
    store.close()
    assert rig.leftovers() == []


async def test_memory_by_page_faults_is_whole_and_goes_on(room: Room) -> None:
    """It runs before it is there; what is captured meanwhile counts from the snapshot; one of everything comes whole. Its pager
    ends with it."""
    vm, pager = await room.restore()
    pagers = _children_of_the_nursery(room.pagers)
    try:
        assert await shell(vm.link, "cat /dev/shm/n") == "1"
        await shell(vm.link, "echo 2 > /dev/shm/n")
        capture = await quiet_capture(vm, resume=True, parent=room.snapshot)
        assert capture.parent == room.snapshot
        assert 0 < capture.memory.count < 4000
        capture.close()
        whole = await room.rig.parts_of(await quiet_capture(vm, resume=True))
        report = await pager.filled()
        assert report is not None
        assert report["faults"] > 0
        assert await shell(vm.link, CHECK) == "fine"
    finally:
        await vm.kill()
    assert pagers
    assert all([await wait_gone(pid, 60) for pid in pagers])
    child = await room.rig.restore(room.rig.make_driver(), whole)
    try:
        assert await shell(child.link, f"cat /dev/shm/n; {CHECK}") == "2\nfine"
    finally:
        await child.kill()


async def test_a_pager_that_dies_takes_its_machine_along(room: Room) -> None:
    vm, pager = await room.restore()
    try:
        pagers = [p for p in _children_of_the_nursery(room.pagers) if p]
        assert pagers
        for pid in pagers:
            os.kill(pid, signal.SIGKILL)
        assert "pager" in await asyncio.wait_for(vm.wait_dead(), 60)
        assert await pager.filled() is None
    finally:
        await vm.kill()


def _children_of_the_nursery(pagers: Pagers) -> list[int]:
    process = pagers._process
    assert process is not None
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("point", ["firecracker.poisoned", "firecracker.taken", "firecracker.entered"])
async def test_a_server_that_dies_in_a_capture_loses_no_page(rig: FirecrackerRig, point: str) -> None:
    """Whatever Firecracker's list of changes is worth afterwards: the next capture has everything, and the VM runs."""
    vm = await rig.fork(rig.make_driver())
    assert isinstance(vm, FirecrackerVm)
    try:
        await shell(vm.link, "echo 1 > /dev/shm/a")
        first = await quiet_capture(vm, resume=True)
        await vm.committed(first, "snp_a")
        first.close()
        await shell(vm.link, "echo 2 > /dev/shm/b")
        await vm.link.freeze()
        with crashing(point):
            await vm.capture(resume=True, parent="snp_a")
        await rig.lose(vm)
        adopted = await rig.make_driver().adopt(vm.id, rig.home / "machines" / vm.id.rsplit("x", 1)[1])
        assert adopted is not None
        await adopted.link.unfreeze()
        poisoned = is_poisoned(adopted._handles.layout.run)
        assert poisoned == (point != "firecracker.entered")
        capture = await quiet_capture(adopted, resume=True, parent="snp_a")
        assert capture.parent == ("" if poisoned else "snp_a")
        if not poisoned:
            capture.close()
            capture = await quiet_capture(adopted, resume=True)
        parts = await rig.parts_of(capture)
        await adopted.kill()
    finally:
        await vm.kill()
    child = await rig.restore(rig.make_driver(), parts)
    try:
        assert await shell(child.link, "cat /dev/shm/a /dev/shm/b") == "1\n2"
    finally:
        await child.kill()
    assert rig.leftovers() == []


async def test_forks_share_the_templates_memory(rig: FirecrackerRig) -> None:
    """A fork's memory is the template's file, mapped privately: what it has not written is counted once for all."""
    one, two = await asyncio.gather(rig.fork(rig.make_driver()), rig.fork(rig.make_driver()))
    try:
        assert isinstance(one, FirecrackerVm)
        inode = f" {(await rig.template()).ram.stat().st_ino} "
        maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in family(one._handles.layout)]
        assert any(inode in text for text in maps)
        assert (await one.stats()).private_bytes < rig.spec.memory_bytes / 2
    finally:
        await asyncio.gather(one.kill(), two.kill())


async def test_eight_gib_that_are_mostly_not_there(rig: FirecrackerRig, images_dir: Path) -> None:
    """Four processors and 8 GiB: booted, forked, captured, restored. What was never touched is nowhere, so it costs nothing.
    Its kernel does not zero freed memory: it would touch all of it at its start, which is a matter of minutes in emulation."""
    home = FirecrackerHome(images_dir)
    boot = replace(home.spec.boot, cmdline_extra="init_on_free=0")
    home.spec = replace(home.spec, boot=boot, cpus=4, memory_bytes=8 * GIB)
    large = FirecrackerRig(home=rig.home, spec=home.spec, firecracker=home)
    seen = f"nproc; awk '/MemTotal/ {{ print ($2 > 7500000) }}' /proc/meminfo; {CHECK}"
    try:
        vm = await large.fork(large.make_driver())
        await shell(vm.link, FILL)
        parts = await large.parts_of(await quiet_capture(vm, resume=True))
        assert parts.memory.count < 64 * MIB // PAGE_BYTES
        child = await large.restore(large.make_driver(), parts)
        for one in (vm, child):
            assert await shell(one.link, seen) == "4\n1\nfine"
            assert (await one.stats()).private_bytes < GIB
            await one.kill()
        assert large.leftovers() == []
    finally:
        home.close()


async def test_an_end_inside_tells_why(rig: FirecrackerRig) -> None:
    """A guest that restarts its machine ends the VMM; whoever asks is told, and nothing hangs."""
    vm = await rig.fork(rig.make_driver())
    try:
        with pytest.raises(RecessError):
            await shell(vm.link, "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x01234567)'")
        assert "exit code 0" in await asyncio.wait_for(vm.wait_dead(), 60)
    finally:
        await vm.kill()
    assert rig.leftovers() == []


@pytest.fixture
def groups() -> Groups:
    found = Groups.find()
    if found.top is None:
        pytest.skip(found.why)
    return found


@pytest.mark.parametrize("life", ["booted", "forked", "restored"])
async def test_all_of_it_is_within_its_limits(rig: FirecrackerRig, groups: Groups, life: str) -> None:
    """Every process but the keeper, the jail's own among them, is in one control group, over a capture and an adoption; the
    group ends with the machine."""
    vm = await rig.live(rig.make_driver(), life)
    try:
        assert isinstance(vm, FirecrackerVm)
        own, layout = Path(vm._handles.journal.group), vm._handles.layout
        assert own.parent == groups.top
        (await quiet_capture(vm, resume=True)).close()
        inside = {int(pid) for pid in (own / "cgroup.procs").read_text().split()}
        everyone = {process.pid for process in family(layout)}
        assert everyone - inside == {read_pids(layout)["keeper"].pid}
        assert inside <= everyone
        assert len(inside) == (3 if vm._handles.jail else 1)  # the jail's outer and first process, and Firecracker
        limits = start.limits_of(rig.spec)
        for name, value in limits.files(groups.controllers).items():
            assert (own / name).read_text().strip() == value
        assert 0 < int((own / "memory.peak").read_text()) < limits.memory_bytes
        await rig.lose(vm)
        adopted = await rig.make_driver().adopt(vm.id, layout.directory)
        assert adopted is not None
        vm = adopted
    finally:
        await vm.kill()
    assert not own.exists()
    assert rig.leftovers() == []


async def test_one_that_wants_more_than_its_limit_is_ended_and_says_why(rig: FirecrackerRig, groups: Groups) -> None:
    """A VMM that works never wants more; so its limit is made smaller than what it has."""
    vm = await rig.fork(rig.make_driver())
    try:
        assert isinstance(vm, FirecrackerVm)
        await shell(vm.link, FILL)
        own = Path(vm._handles.journal.group)
        if (own / "memory.swap.max").exists():
            (own / "memory.swap.max").write_text("0")
        (own / "memory.max").write_text(str(4 * MIB))
        assert "it wanted more memory than its limit" in await asyncio.wait_for(vm.wait_dead(), 120)
    finally:
        await vm.kill()
    assert not own.exists()
    assert rig.leftovers() == []
