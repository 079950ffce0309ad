"""Exact dirty tracking on real guests: no page is missed, in every way a host may offer; and it goes on over everything."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recess.drivers.kept import disk
from recess.drivers.kept.keeper import read_pids
from recess.drivers.qemu import QemuVm
from recess.drivers.qemu.memory import begin_tracking
from recess.guestlink.link import ExecRequest
from recess.machines.contract import Capture
from recess.testing.driver_suite import quiet_capture, shell
from recess.testing.qemu_rig import QemuHome, QemuRig
from recess.units import PAGE_BYTES

# One stretch that is written anew, and thousands of single pages: the kernel tells of the two in different ways.
SCATTERED = "import mmap; m = mmap.mmap(-1, 48 << 20)\nwhile True:\n for at in range(0, len(m), 8192): m[at] = (m[at] + 1) % 251"
WRITER = f"python3 -c '{SCATTERED}' & while true; do head -c 3000000 /dev/urandom > /dev/shm/noise; done"


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> QemuRig:
    home = QemuHome.shared(images_dir)
    return QemuRig(home=tmp_path, spec=home.spec, qemu=home)


def with_tracking(rig: QemuRig, mode: str, monkeypatch: pytest.MonkeyPatch) -> QemuRig:
    monkeypatch.setattr(rig.qemu, "config", replace(rig.qemu.config, page_tracking=mode))
    return rig


def apply(memory: np.ndarray, capture: Capture) -> int:
    """Put a capture's pages over what is known of the memory; return how many there were."""
    indices, data = disk.as_arrays(capture.memory)
    memory[indices] = data
    count = len(indices)
    del indices, data
    capture.close()
    return count


def differing_pages(vm: QemuVm, ram: Path, expected: np.ndarray) -> int:
    """Compare all memory of a paused VM, as the kernel shows it, with what captures say."""
    pid = read_pids(vm._handles.layout)["vmm"].pid
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    start = int(next(line for line in maps if line.endswith(str(ram))).split("-")[0], 16)
    wrong = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as handle:
        for page in range(0, len(expected), 4096):
            handle.seek(start + page * PAGE_BYTES)
            there = np.frombuffer(handle.read(4096 * PAGE_BYTES), np.uint8).reshape(-1, PAGE_BYTES)
            wrong += int((there != expected[page : page + 4096]).any(axis=1).sum())
    return wrong


@pytest.mark.parametrize("mode", ["auto", "user", "private"])
async def test_captures_one_after_the_other_are_the_memory(
    rig: QemuRig, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Template, a first capture and three more: byte for byte what the VM holds, while a program writes all the time.

    One of them is never stored, one holds more than is copied at once."""
    with_tracking(rig, mode, monkeypatch)
    vm = await rig.fork(rig.make_driver())
    try:
        about = vm.about_memory()
        assert (about["tracking"] == "none") == (mode == "private")
        assert about["tracking_why"]
        ref = await rig.template()
        memory = np.fromfile(ref.ram, np.uint8).reshape(-1, PAGE_BYTES)
        await shell(vm.link, "head -c 40000000 /dev/urandom > /dev/shm/big")
        first = await quiet_capture(vm, resume=True)
        whole = apply(memory, first)
        await vm.committed(first, "snp_1")
        writer = await vm.link.exec(ExecRequest(["sh", "-c", WRITER]))
        (await vm.capture(resume=True, parent="snp_1")).close()  # never stored
        second = await vm.capture(resume=True, parent="snp_1")
        counts = [apply(memory, second)]
        await vm.committed(second, "snp_2")
        await shell(vm.link, "cat /dev/shm/big > /dev/shm/copy")  # beyond what one round leaves alone
        third = await vm.capture(resume=True, parent="snp_2")
        counts.append(apply(memory, third))
        await vm.committed(third, "snp_3")
        await writer.signal(signal.SIGKILL)
        last = await quiet_capture(vm, resume=False, parent="snp_3")
        assert last.parent == ("" if mode == "private" else "snp_3")
        counts.append(apply(memory, last))
        assert isinstance(vm, QemuVm)
        assert differing_pages(vm, ref.ram, memory) == 0
        if mode != "private":
            assert counts[0] < whole / 2
            assert counts[1] > 40_000_000 // PAGE_BYTES
            assert counts[2] < whole / 2
    finally:
        await vm.kill()
    assert rig.leftovers() == []


async def test_a_booted_machine_is_tracked_too(rig: QemuRig) -> None:
    vm = await rig.boot(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        memory = np.zeros((rig.spec.memory_bytes // PAGE_BYTES, PAGE_BYTES), np.uint8)
        first = await quiet_capture(vm, resume=True)
        whole = apply(memory, first)
        await vm.committed(first, "snp_1")
        await shell(vm.link, "head -c 1000000 /dev/urandom > /dev/shm/x")
        assert apply(memory, await quiet_capture(vm, resume=False, parent="snp_1")) < whole / 2
        assert differing_pages(vm, vm._handles.layout.ram, memory) == 0
    finally:
        await vm.kill()


async def test_a_vmm_that_may_not_be_traced_is_not_tracked(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else traces it: that is told, and it works all the same."""
    with_tracking(rig, "private", monkeypatch)
    vm = await rig.fork(rig.make_driver())
    try:
        assert isinstance(vm, QemuVm)
        tracer = trace(read_pids(vm._handles.layout)["vmm"].pid)
        try:
            tracking = await begin_tracking(vm._handles.keeper, "", mode="auto")
        finally:
            tracer.kill()
            tracer.wait()
            for pipe in (tracer.stdin, tracer.stdout):
                assert pipe is not None
                pipe.close()
        assert not tracking.exact
        assert "not permitted" in tracking.why
        (await quiet_capture(vm, resume=True)).close()
        assert await shell(vm.link, "echo alive") == "alive"
    finally:
        await vm.kill()


def trace(pid: int) -> subprocess.Popen[bytes]:
    """Start a process that traces this one until it is killed."""
    script = f"""
import ctypes, sys, time
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
print(ptrace(0x4206, {pid}, None, None), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"0\n", os.strerror(ctypes.get_errno())
    return process
