"""Memory that comes while the machine runs, on real guests: right to the last page, and never made up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from recess.blobs import LocalBlobs
from recess.drivers.kept import disk
from recess.drivers.kept.keeper import wait_gone
from recess.drivers.qemu import QemuVm
from recess.errors import RecessError
from recess.machines.athand import AtHand
from recess.machines.contract import PageSet, RestoreParts, TemplateRef, Vm
from recess.machines.mapped import DISK, MEMORY, MappedTemplate, capture_parts, to_pages
from recess.node.pagers import Pager, Pagers
from recess.paging.pagefiles import PageFiles
from recess.snapshots import SnapshotMeta, Store
from recess.testing.driver_suite import NO_PAGES, quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig

FILL = "head -c 40000000 /dev/urandom > /dev/shm/big; sha256sum /dev/shm/big > /dev/shm/sum; echo 1 > /dev/shm/n"
CHECK = "sha256sum -c /dev/shm/sum > /dev/null && echo fine"
META = SnapshotMeta(fingerprint={}, spec={})


@dataclass
class Room:
    """A store with one snapshot of a machine that holds 40 MB of noise, and what restores it."""

    rig: QemuRig
    store: Store
    pagers: Pagers
    ref: TemplateRef
    template: MappedTemplate
    home: Path
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

    def layer_file(self) -> Path:
        (layer,) = self.home.rglob("lyr_*")
        return layer


@pytest.fixture
async def room(tmp_path: Path, images_dir: Path) -> AsyncIterator[Room]:
    home = QemuHome.shared(images_dir)
    rig = QemuRig(home=tmp_path, spec=home.spec, qemu=home)
    config = replace(home.config, home=tmp_path / "home")
    store, pagers = Store(LocalBlobs(config.blobs_dir)), Pagers(config)
    ref = await rig.template()
    room = Room(rig, store, pagers, ref, MappedTemplate.of(replace(ref, id="snp_" + "0" * 64)), config.home)
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
    room.pagers.close()
    store.close()
    assert rig.leftovers() == []


async def test_it_runs_before_it_is_there_and_is_whole_in_the_end(room: Room) -> None:
    vm, pager = await room.restore()
    try:
        assert await shell(vm.link, "cat /dev/shm/n") == "1"
        assert vm.about_memory()["memory"] == "lazy: a test"
        report = await pager.filled()
        assert report is not None
        assert 0 < report["fault_bytes"] < report["stored_bytes"] / 10  # what its first moments needed
        assert report["bytes_read"] >= 40_000_000
        assert vm.about_memory()["pager_state"] == "every page is there"
        assert await shell(vm.link, CHECK) == "fine"
        # what was brought counts as not written: the next capture is small
        await shell(vm.link, "echo 2 > /dev/shm/n")
        capture = await quiet_capture(vm, resume=True, parent=room.snapshot)
        assert capture.parent == room.snapshot
        assert capture.memory.count < 4000
        capture.close()
    finally:
        await vm.kill()


async def test_what_a_pager_brought_is_at_hand_the_next_time(room: Room) -> None:
    """It is written down as it comes: page for page what is stored, whatever the machine has made of its own since."""
    folder = room.home / "pages"
    at_hand = AtHand(PageFiles(folder, max_bytes=1 << 30))
    config = replace(room.rig.qemu.config, home=room.home)
    room.pagers.close()
    room.pagers = Pagers(config, at_hand.keep_file)
    vm, pager = await room.restore()
    try:
        await shell(vm.link, "echo 2 > /dev/shm/n; head -c 1000000 /dev/urandom > /dev/shm/big")
        assert await pager.filled() is not None
    finally:
        await vm.kill()
    ground = replace(room.ref, id=room.store.manifest(room.snapshot)["template"])
    mapped = at_hand.find(room.snapshot, ground)
    assert mapped is not None
    indices, data = disk.as_arrays(disk.read_runs(mapped.files, mapped.runs))
    stored, expected = disk.as_arrays(to_pages(room.store.overlay(room.snapshot, MEMORY, template=room.template)))
    at = np.searchsorted(indices, stored)
    assert (indices[at] == stored).all()
    assert (data[at] == expected).all()
    gaps = np.setdiff1d(indices, stored)
    assert (data[np.searchsorted(indices, gaps)] == room.template.part(MEMORY)[gaps]).all()
    parts = RestoreParts(
        room.ref, NO_PAGES, to_pages(room.store.overlay(room.snapshot, DISK, template=room.template)),
        room.store.vmstate(room.snapshot), room.snapshot, mapped=mapped, choice="remap: a test",
    )  # fmt: skip
    vm = await room.rig.restore(room.rig.make_driver(), parts)
    try:
        assert vm.about_memory()["memory"] == "remap: a test"
        assert await shell(vm.link, CHECK) == "fine"
    finally:
        await vm.kill()
        at_hand.close()


async def test_a_capture_while_pages_are_still_absent(room: Room) -> None:
    """It holds what was written; all that is absent is inherited, never taken for zeros."""
    vm, _ = await room.restore()
    try:
        await shell(vm.link, "echo 2 > /dev/shm/n")
        capture = await quiet_capture(vm, resume=False, parent=room.snapshot)
        assert capture.parent == room.snapshot
        report = await asyncio.to_thread(
            lambda: room.store.write(
                capture_parts(capture), capture.vmstate, META, template=room.template, parent_id=room.snapshot
            )
        )
        capture.close()
    finally:
        await vm.kill()
    room.snapshot = report.snapshot_id
    child, pager = await room.restore()
    try:
        # everything at once, of a machine that has just come: it waits until all is there, and stands alone
        whole = await quiet_capture(child, resume=True)
        assert await pager.filled() is not None
        assert await shell(child.link, "cat /dev/shm/n") == "2"
        assert await shell(child.link, CHECK) == "fine"
        assert whole.parent == ""
        assert whole.memory.count > 40_000_000 // 4096
        whole.close()
    finally:
        await child.kill()


async def test_a_pager_that_dies_takes_its_machine_along(room: Room) -> None:
    """Never a page of zeros, never a machine that hangs: it is ended, and can be restored again."""
    vm, _ = await room.restore()
    try:
        os.kill(pager_process(room), signal.SIGKILL)
        assert "its pager died" in await asyncio.wait_for(vm.wait_dead(), 10)
    finally:
        await vm.kill()
    again, pager = await room.restore()
    try:
        assert await shell(again.link, CHECK) == "fine"
        assert await pager.filled() is not None
    finally:
        await again.kill()


def pager_processes(room: Room) -> list[int]:
    """Return the pagers that run, children of the nursery."""
    nursery = room.pagers._process
    assert nursery is not None
    return [int(pid) for pid in Path(f"/proc/{nursery.pid}/task/{nursery.pid}/children").read_text().split()]


def pager_process(room: Room) -> int:
    """Return the one that must be running."""
    (pid,) = pager_processes(room)
    return pid


async def test_a_damaged_frame_ends_the_machine(room: Room) -> None:
    """One flipped bit among pages that nobody touches at once: found by the fill, named, and nothing is served."""
    layer = room.layer_file()
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 1
    layer.chmod(0o600)
    layer.write_bytes(data)
    vm, pager = await room.restore()
    try:
        assert "its pager died" in await asyncio.wait_for(vm.wait_dead(), 30)
        assert await pager.filled() is None
        assert "hash" in pager.failure or "lyr_" in pager.failure
    finally:
        await vm.kill()


async def test_a_snapshot_that_cannot_be_opened_is_an_error_at_once(room: Room) -> None:
    good, room.snapshot = room.snapshot, "snp_" + "1" * 64
    disk, state = NO_PAGES, room.store.vmstate(good)
    pager = await room.pagers.make(room.snapshot, MEMORY, room.ref.ram, {}, never)
    parts = RestoreParts(room.ref, NO_PAGES, disk, state, room.snapshot, lazy=pager)
    with pytest.raises(RecessError, match="no such snapshot"):
        await room.rig.restore(room.rig.make_driver(), parts)
    await pager.close()
    room.snapshot = good


async def never() -> object:
    raise AssertionError("nothing is read at once here")


async def test_the_server_may_go_meanwhile(room: Room) -> None:
    """Pages keep coming, the next server finds the machine, and tracking goes on. The pager ends with its machine."""
    vm, pager = await room.restore()
    serving = pager_processes(room)
    assert isinstance(vm, QemuVm)
    directory = vm._handles.layout.directory
    await room.rig.lose(vm)
    room.pagers.close()
    adopted = await room.rig.make_driver().adopt(vm.id, directory)
    assert adopted is not None
    try:
        assert await shell(adopted.link, CHECK) == "fine"
        capture = await quiet_capture(adopted, resume=False, parent=room.snapshot)
        assert capture.parent == room.snapshot
        capture.close()
    finally:
        await adopted.kill()
        await pager.close()
    assert all([await wait_gone(pid, 20) for pid in serving])


@pytest.mark.parametrize("mode", ["user", "private"])
async def test_a_host_that_cannot_reads_everything_first(
    room: Room, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.rig.qemu, "config", replace(room.rig.qemu.config, page_tracking=mode))
    vm, _ = await room.restore()
    try:
        assert vm.about_memory()["memory"].startswith("inject: ")
        assert await shell(vm.link, CHECK) == "fine"
    finally:
        await vm.kill()
