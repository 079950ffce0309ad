"""A disk of 2 GiB that its machine has written half a gigabyte of: each snapshot costs the 10 MiB that changed since the last
one, over a failed snapshot, a new server, a nap and a fork; and every copy of the machine has every byte."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from recess.config import Config, load_config
from recess.drivers.qemu import capture
from recess.errors import OutOfSpace
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec, SnapshotRow
from recess.node.local import LocalNode
from recess.units import GIB, MIB, PAGE_BYTES

SPEC = MachineSpec(memory_bytes=256 * MIB, disk_bytes=2 * GIB)
CHANGED = 10 * MIB // PAGE_BYTES
SLACK = 512  # blocks: the journal's, and what the file system writes of its own
STORED = 12_000_000
SUMS = "for part in $(seq 0 31); do dd if=/root/big bs=16M skip=$part count=1 2>/dev/null | sha256sum; done | sha256sum"


@pytest.fixture
async def config(images_dir: Path, tmp_path: Path, run_base: Path) -> AsyncIterator[Config]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    run_dir = run_base / f"recess-hd-{secrets.token_hex(4)}"
    yield load_config({}, home=str(home), run_dir=str(run_dir), driver="qemu")
    shutil.rmtree(run_dir, ignore_errors=True)


async def shell(node: LocalNode, ref: str, script: str) -> str:
    link = await node.machines.link((await node.machines.get(ref)).id)
    job = await link.exec(ExecRequest(argv=["sh", "-ec", script]))
    out = b"".join([data async for _, data in job.output()])
    assert await job.wait() == 0, out
    return out.decode().strip()


async def change(node: LocalNode, ref: str, at: int) -> None:
    """Write 10 MiB in the middle of the file, and have it on the disk."""
    await shell(node, ref, f"head -c 10M /dev/urandom | dd of=/root/big bs=1M seek={at} conv=notrunc 2>/dev/null; sync")


def check_cost(row: SnapshotRow) -> None:
    assert CHANGED <= row.figures["pages_captured"]["disk0"] <= CHANGED + SLACK
    assert row.figures["new_bytes"] <= STORED


@pytest.mark.timeout(1500)
async def test_a_snapshot_costs_what_changed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await LocalNode.open(config, progress=print)
    try:
        ref = (await node.machines.create(SPEC, name="writer")).id
        await shell(node, ref, "head -c 512M /dev/urandom > /root/big; sync")
        first = await node.machines.snapshot(ref)
        assert first.figures["pages_captured"]["disk0"] >= 512 * MIB // PAGE_BYTES
        for at in range(3):
            await change(node, ref, 20 * at)
            check_cost(await node.machines.snapshot(ref))

        with monkeypatch.context() as patch:
            patch.setattr(capture, "_pick_blocks", refuse)
            with pytest.raises(OutOfSpace):
                await node.machines.snapshot(ref)
        await change(node, ref, 100)
        check_cost(await node.machines.snapshot(ref))

        await node.close(detach=True)
        node = await LocalNode.open(config, progress=print)
        await change(node, ref, 200)
        check_cost(await node.machines.snapshot(ref))

        sums = await shell(node, ref, SUMS)
        (child,) = await node.machines.fork(ref)
        assert await shell(node, child.id, f"echo 3 > /proc/sys/vm/drop_caches; {SUMS}") == sums
        await node.machines.remove(child.id, force=True)
        await node.machines.suspend(ref)
        await node.machines.bring_back(ref)
        assert await shell(node, ref, f"echo 3 > /proc/sys/vm/drop_caches; {SUMS}") == sums
        await node.machines.snapshot(ref)  # what the sums brought into memory
        await change(node, ref, 300)
        last = await node.machines.snapshot(ref)
        check_cost(last)
        sums = await shell(node, ref, SUMS)
        other, _ = await node.machines.restore(last.id)
        assert await shell(node, other.id, f"echo 3 > /proc/sys/vm/drop_caches; {SUMS}") == sums
        await node.machines.verify_snapshot(last.id)
    finally:
        for left in await node.machines.list_machines(everything=True):
            await node.machines.remove(left.id, force=True)
        await node.close()


def refuse(*_args: Any) -> Any:
    raise OutOfSpace("a test's")
