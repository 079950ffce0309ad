"""A host that swaps: pages of a guest that lie in swap are the guest's memory like any other. They are counted, captured and
compared byte for byte, in each way in which pages are found. Needs root (a swap file is turned on for the time)."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuVm
from recess.testing.driver_suite import quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig
from recess.units import MIB, PAGE_BYTES
from tests.machines.test_paging import apply, differing_pages

PROCESS_MADVISE = 440
MADV_PAGEOUT = 21


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root may turn on swap")
    file = tmp_path / "swap"
    with file.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, 512 * MIB)
    file.chmod(0o600)
    subprocess.run(["mkswap", "-q", str(file)], check=True)
    subprocess.run(["swapon", str(file)], check=True)
    yield file
    subprocess.run(["swapoff", str(file)], check=True)


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> QemuRig:
    home = QemuHome.shared(images_dir)
    return QemuRig(home=tmp_path, spec=home.spec, qemu=home)


def page_out(vm: QemuVm, ram: Path) -> int:
    """Ask the kernel to put the guest's memory into swap; return the bytes of it that are there then."""
    pid = read_pids(vm._handles.layout)["vmm"].pid
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    at = next(at for at, line in enumerate(lines) if line.endswith(str(ram)))
    start, end = (int(part, 16) for part in lines[at].split()[0].split("-"))
    pidfd = os.pidfd_open(pid)
    try:
        for piece in range(start, end, 16 * MIB):
            vector = ctypes.create_string_buffer(struct.pack("QQ", piece, min(16 * MIB, end - piece)))
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syscall(PROCESS_MADVISE, pidfd, vector, 1, MADV_PAGEOUT, 0) < 0:
                raise OSError(ctypes.get_errno(), "process_madvise")
    finally:
        os.close(pidfd)
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    at = next(at for at, line in enumerate(lines) if line.endswith(str(ram)))
    line = next(line for line in lines[at:] if line.startswith("Swap:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("mode", ["auto", "user", "private"])
async def test_pages_in_swap_are_captured(rig: QemuRig, mode: str, swap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.qemu, "config", replace(rig.qemu.config, page_tracking=mode))
    vm = await rig.fork(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        ref = await rig.template()
        memory = np.fromfile(ref.ram, np.uint8).reshape(-1, PAGE_BYTES)
        await shell(vm.link, "head -c 60000000 /dev/urandom > /dev/shm/big")
        assert page_out(vm, ref.ram) > 60_000_000
        first = await quiet_capture(vm, resume=True)
        assert apply(memory, first) > 60_000_000 // PAGE_BYTES
        await vm.committed(first, "snp_1")
        await shell(vm.link, "head -c 20000000 /dev/urandom > /dev/shm/more")
        assert page_out(vm, ref.ram) > 20_000_000
        last = await quiet_capture(vm, resume=False, parent="snp_1")
        count = apply(memory, last)
        assert count > 20_000_000 // PAGE_BYTES
        if mode != "private":
            assert count < 60_000_000 // PAGE_BYTES
        assert differing_pages(vm, ref.ram, memory) == 0
    finally:
        await vm.kill()
    assert rig.leftovers() == []


async def test_a_booted_machine_in_swap(rig: QemuRig, swap: Path) -> None:
    vm = await rig.boot(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        memory = np.zeros((rig.spec.memory_bytes // PAGE_BYTES, PAGE_BYTES), np.uint8)
        await shell(vm.link, "head -c 60000000 /dev/urandom > /dev/shm/big")
        page_out(vm, vm._handles.layout.ram)
        apply(memory, await quiet_capture(vm, resume=False))
        assert differing_pages(vm, vm._handles.layout.ram, memory) == 0
    finally:
        await vm.kill()
