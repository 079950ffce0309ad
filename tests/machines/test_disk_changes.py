"""A disk's captures one after the other, on real guests: each holds what changed since the last one that was stored, and all
of them together are the disk, byte for byte, whatever failed, was lost or died in between."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recess.drivers.kept import disk
from recess.drivers.kept.layout import layout_for
from recess.drivers.qemu import QemuVm, blocks, capture
from recess.drivers.qemu import vm as vm_module
from recess.errors import OutOfSpace
from recess.guestlink.link import ExecRequest
from recess.images.disk import clone_sparse
from recess.machines.contract import Capture, Vm
from recess.testing.driver_suite import quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig
from recess.units import MIB, PAGE_BYTES
from tests.machines.test_driver_qemu import lose_server

MUCH = 16 * MIB // PAGE_BYTES


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> QemuRig:
    home = QemuHome.shared(images_dir)
    return QemuRig(home=tmp_path, spec=home.spec, qemu=home)


class Rebuilt:
    """A disk made of a first one and of captures put over it."""

    def __init__(self, first: Path, path: Path) -> None:
        self.path = path
        clone_sparse(first, path)

    def take(self, capture: Capture) -> int:
        """Put a capture's blocks over it; return how many there were."""
        indices, data = disk.as_arrays(capture.disk)
        with self.path.open("r+b") as handle:
            disk.write_pages(handle.fileno(), indices, data)
        count = len(indices)
        del indices, data
        capture.close()
        return count

    def differing(self, image: Path) -> int:
        """Return how many blocks of a disk that nobody writes are others here."""
        with image.open("rb") as handle:
            nothing = np.empty(0, np.uint32)
            found = disk.changed_blocks(self.path, handle.fileno(), nothing, self.path.parent)
        count = found.pages.count
        found.close()
        return count


async def lean(vm: Vm, parent: str, *, resume: bool = True) -> Capture:
    """Capture what changed since then, of the disk, too, without quiet: the guest writes on until the pause."""
    return await vm.capture(resume=resume, parent=parent, disk_too=True)


WRITER = "while true; do head -c 300000 /dev/urandom > /root/noise; sync; rm /root/noise; done"


async def test_captures_one_after_the_other_are_the_disk(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = rig.make_driver()
    vm: Vm | None = await rig.fork(driver)
    assert isinstance(vm, QemuVm)
    directory = vm._handles.layout.directory
    try:
        rebuilt = Rebuilt((await rig.template()).disk, rig.home / "rebuilt")
        await shell(vm.link, f"head -c {MUCH * PAGE_BYTES} /dev/urandom > /root/big; sync")
        first = await lean(vm, "snp_0")
        assert first.disk_parent == ""  # nobody has said that it is stored
        assert rebuilt.take(first) >= MUCH
        await vm.committed(first, "snp_1")
        writer = await vm.link.exec(ExecRequest(["sh", "-c", WRITER]))

        # One fails after the pause, one is never stored: what they would have held is in the next.
        await shell(vm.link, "head -c 1000000 /dev/urandom | dd of=/root/big bs=64k conv=notrunc seek=20; sync")
        with monkeypatch.context() as patch:
            patch.setattr(capture, "_pick_blocks", fail)
            with pytest.raises(OutOfSpace):
                await lean(vm, "snp_1")
        (await lean(vm, "snp_1")).close()
        second = await lean(vm, "snp_1")
        assert second.disk_parent == second.parent == "snp_1"
        assert 200 < rebuilt.take(second) < MUCH / 2
        await vm.committed(second, "snp_2")

        # A new server goes on where the old one was; the word for the disk does not get through there.
        await rig.lose(vm)
        vm = await rig.make_driver().adopt(vm.id, directory)
        assert isinstance(vm, QemuVm)
        third = await lean(vm, "snp_2")
        assert third.disk_parent == "snp_2"
        assert rebuilt.take(third) < MUCH / 2
        with monkeypatch.context() as patch:
            patch.setattr(vm_module, "commit", fail)
            with pytest.raises(OutOfSpace):
                await vm.committed(third, "snp_3")
        assert set(await blocks.find_bitmaps(vm._handles.qmp)) == {"since-start", "since snp_2", "after"}
        fourth = await lean(vm, "snp_3")
        assert fourth.disk_parent == "snp_3"
        assert rebuilt.take(fourth) >= MUCH  # all since the start: more than it needs, never less
        await vm.committed(fourth, "snp_4")

        await (await vm.link.attach(writer.job_id)).signal(signal.SIGKILL)
        await shell(vm.link, "dd if=/dev/zero of=/root/big bs=64k count=32 conv=notrunc; echo last > /root/last; sync")
        last = await quiet_capture(vm, resume=False, parent="snp_4")
        assert (last.parent, last.disk_parent) == ("snp_4", "")  # the whole disk was asked for
        whole = Rebuilt((await rig.template()).disk, rig.home / "whole")
        whole.take(last)
        rebuilt.take(await lean(vm, "snp_4", resume=False))
        assert (whole.differing(directory / "disk.raw"), rebuilt.differing(directory / "disk.raw")) == (0, 0)
        assert not blocks_socket(vm).exists()
    finally:
        if vm is not None:
            await vm.kill()
    assert list(rig.home.glob("machines/*/disk*")) == []


def fail(*_args: Any) -> Any:
    raise OutOfSpace("a test's")


def blocks_socket(vm: QemuVm) -> Path:
    return vm._handles.layout.run / "blocks.sock"


@pytest.mark.parametrize("point", ["qemu.disk_begun", "qemu.disk_commit"])
async def test_a_server_dies_between_the_two(rig: QemuRig, tmp_path: Path, point: str) -> None:
    """In the pause, with the copy begun; and between the keeper's word and the disk's. `snp_1` is what it left beside it."""
    directory = tmp_path / "machine"
    await lose_server(rig, directory, point)
    vm = await rig.make_driver().adopt("lost", directory)
    assert isinstance(vm, QemuVm)
    try:
        base = vm._handles.tracking.base
        assert base == ("snp_1" if point == "qemu.disk_begun" else "snp_2")
        rebuilt = Rebuilt(tmp_path / base, tmp_path / "rebuilt")
        if point == "qemu.disk_begun":  # its workload was frozen for the capture
            await vm.link.unfreeze()
        await shell(vm.link, "echo after > /root/after; sync")
        last = await lean(vm, base, resume=False)
        assert last.disk_parent == base
        assert rebuilt.take(last) > 0
        assert rebuilt.differing(layout_for(rig.qemu.run_dir, "lost", directory).disk) == 0
    finally:
        await vm.kill()
