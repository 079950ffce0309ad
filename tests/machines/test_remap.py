"""Memory mapped in place, on real guests: the same bytes, shared until written, and every write known from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recess.drivers.kept import disk
from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuVm
from recess.machines.contract import Capture, RestoreParts, Vm
from recess.machines.mapped import mapped_capture
from recess.testing.driver_suite import new_thaw, quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig
from recess.units import PAGE_BYTES

FILL = "head -c 20000000 /dev/urandom > /dev/shm/big; sha256sum /dev/shm/big > /dev/shm/sum; echo 1 > /dev/shm/n"
CHECK = "sha256sum -c /dev/shm/sum > /dev/null && cat /dev/shm/n"

Rigs = Callable[[str], QemuRig]


@pytest.fixture
def rigs(tmp_path: Path, images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Rigs:
    home = QemuHome.shared(images_dir)

    def make(page_tracking: str) -> QemuRig:
        monkeypatch.setattr(home, "config", replace(home.config, page_tracking=page_tracking))
        return QemuRig(home=tmp_path, spec=home.spec, qemu=home)

    return make


async def child(rig: QemuRig, capture: Capture, snapshot: str = "", *, only_file: bool = False) -> QemuVm:
    """Return a machine whose memory is the capture's own file; it is not needed any more after this."""
    parts = RestoreParts(
        await rig.template(), disk.EMPTY if only_file else capture.memory, capture.disk, capture.vmstate, snapshot,
        mapped=mapped_capture(capture), choice="remap: a test",
    )  # fmt: skip
    vm = await rig.restore(rig.make_driver(), parts)
    assert isinstance(vm, QemuVm)
    return vm


def apply(memory: np.ndarray, capture: Capture) -> int:
    """Put a capture's pages over what is known of the memory; return how many there were."""
    indices, data = disk.as_arrays(capture.memory)
    memory[indices] = data
    return len(indices)


def _offset(line: str) -> int:
    return int(line.split()[2], 16)


def differing_pages(vm: Vm, expected: np.ndarray) -> int:
    """Compare all memory of a paused VM, as the kernel shows it at the addresses of its first mapping, with this."""
    assert isinstance(vm, QemuVm)
    pid = read_pids(vm._handles.layout)["vmm"].pid
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    first = min((line for line in maps if line.endswith(vm._handles.journal.ram)), key=_offset)
    start = int(first.split("-")[0], 16) - _offset(first)
    wrong = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as handle:
        for page in range(0, len(expected), 4096):
            handle.seek(start + page * PAGE_BYTES)
            there = np.frombuffer(handle.read(4096 * PAGE_BYTES), np.uint8).reshape(-1, PAGE_BYTES)
            wrong += int((there != expected[page : page + 4096]).any(axis=1).sum())
    return wrong


@pytest.mark.parametrize("mode", ["auto", "user", "private"])
async def test_a_line_of_children_is_right_to_the_last_page(rigs: Rigs, mode: str) -> None:
    """Parent, child and grandchild, each over the captured file of the one before: what is captured of each is its memory,
    whether writes are tracked (with rights or without) or a capture takes all that is private."""
    rig = rigs(mode)
    ref = await rig.template()
    template = np.fromfile(ref.ram, np.uint8).reshape(-1, PAGE_BYTES)
    vm: Vm = await rig.fork(rig.make_driver())
    try:
        await shell(vm.link, FILL)
        for number in range(1, 3):
            capture = await quiet_capture(vm, resume=False)
            memory = template.copy()
            whole = apply(memory, capture)
            assert differing_pages(vm, memory) == 0
            await vm.kill()
            vm = await child(rig, capture, f"snp_{number}")
            capture.close()
            assert vm.about_memory()["memory"] == "remap: a test"
            assert vm.about_memory()["tracking"] == {"auto": "kernel", "user": "user", "private": "none"}[mode]
            assert await shell(vm.link, CHECK) == str(number)
            await shell(vm.link, f"echo {number + 1} > /dev/shm/n")
            last = await quiet_capture(vm, resume=False, parent=f"snp_{number}")
            base = memory if last.parent else template.copy()
            delta = apply(base, last)
            assert differing_pages(vm, base) == 0
            if mode == "private":
                assert not last.parent
            else:  # a page that was never touched since it was mapped is inherited
                assert last.parent == f"snp_{number}"
                assert delta < whole / 2
            last.close()
            await vm.unpause()
            await vm.link.thaw(new_thaw())
    finally:
        await vm.kill()
    assert rig.leftovers() == []


async def test_siblings_share_what_they_were_made_from(rigs: Rigs) -> None:
    rig = rigs("auto")
    vm: Vm = await rig.fork(rig.make_driver())
    family: list[Vm] = [vm]
    try:
        await shell(vm.link, FILL)
        capture = await quiet_capture(vm, resume=True)
        family += [await child(rig, capture), await child(rig, capture)]
        capture.close()
        for one in family:
            assert await shell(one.link, CHECK) == "1"
        own, *children = [(await one.stats()).private_bytes for one in family]
        assert max(children) < own - 15_000_000  # the 20 MB were read by all and belong to none
    finally:
        for one in family:
            await one.kill()
    assert rig.leftovers() == []


async def test_a_host_that_cannot_map_gets_every_page(rigs: Rigs) -> None:
    """Once with the pages at hand, once only with their file."""
    rig = replace(rigs("auto"), devices_command=False)  # its machines map their memory shared
    vm: Vm = await rig.fork(rig.make_driver())
    try:
        await shell(vm.link, FILL)
        capture = await quiet_capture(vm, resume=False)
        await vm.kill()
        for only_file in (False, True):
            vm = await child(rig, capture, only_file=only_file)
            assert vm.about_memory()["memory"] == "inject: its memory is not a private mapping"
            assert await shell(vm.link, CHECK) == "1"
            await vm.kill()
        capture.close()
    finally:
        await vm.kill()
