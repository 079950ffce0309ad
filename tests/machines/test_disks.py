"""What a real machine's disk lives through: a full host, a restart of the server meanwhile, the end of its VM."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.kept.keeper import read_pids
from recess.drivers.kept.layout import layout_for
from recess.errors import OutOfSpace
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.small_disk import small_disk
from recess.units import GIB, MIB

pytestmark = [pytest.mark.machines, pytest.mark.mounts]

SPEC = MachineSpec(memory_bytes=256 * MIB, disk_bytes=2 * GIB)
WRITTEN = 20 * MIB


async def sh(node, ref, script):
    link = await node.machines.link((await node.machines.get(ref)).id)
    job = await link.exec(ExecRequest(argv=["sh", "-c", script]))
    out = b"".join([data async for _, data in job.output()])
    assert await job.wait() == 0, out
    return out.decode().strip()


async def until(node, ref, state):
    for _ in range(600):
        row = await node.machines.get(ref)
        if row.state == state:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{row.state}: {row.status}")


@pytest.mark.timeout(400)
async def test_a_full_host_a_restart_and_a_killed_vm_lose_no_file(tmp_path, images_dir):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    run_dir = Path("/dev/shm") / f"recess-d-{secrets.token_hex(4)}"
    config = load_config({}, home=str(home), run_dir=str(run_dir), driver="qemu")
    with small_disk(config.machines_dir, 160 * MIB):
        lines: list[str] = []
        node = await LocalNode.open(config, progress=lines.append)
        try:
            row = await node.machines.create(SPEC, name="m1")
            ballast = config.machines_dir / "ballast"
            free = shutil.disk_usage(config.machines_dir).free
            ballast.write_bytes(bytes(free - WRITTEN // 2))
            boot_id = await sh(node, "m1", "cat /proc/sys/kernel/random/boot_id")
            await sh(
                node, "m1", f"head -c {WRITTEN} /dev/urandom > /dev/shm/big; sha256sum < /dev/shm/big > /dev/shm/sum"
            )
            link = await node.machines.link(row.id)
            await link.exec(
                ExecRequest(["sh", "-c", "cp /dev/shm/big /root/big; cp /dev/shm/sum /root/sum; sync"], job_id="w")
            )
            await until(node, "m1", "stalled")
            assert "full" in (await node.machines.get("m1")).status
            with pytest.raises(OutOfSpace):
                await node.machines.link(row.id)

            await node.close(detach=True)
            node = await LocalNode.open(config, progress=lines.append)
            assert node.recovered["adopted"] == 1
            assert (await node.machines.get("m1")).state == "stalled"
            ballast.unlink()
            await until(node, "m1", "running")
            assert any("goes on after" in line for line in lines)
            assert await (await (await node.machines.link(row.id)).attach("w")).wait() == 0
            check = "sha256sum < /root/big | cmp - /root/sum && echo same"
            assert await sh(node, "m1", f"echo 3 > /proc/sys/vm/drop_caches; {check}") == "same"
            assert "error" not in await sh(node, "m1", "dmesg | grep -i 'I/O error' || true")
            assert await sh(node, "m1", "cat /proc/sys/kernel/random/boot_id") == boot_id

            vmm = read_pids(layout_for(run_dir, row.id, config.machines_dir / row.id))["vmm"]
            os.kill(vmm.pid, signal.SIGKILL)
            await node.machines.wait_dead(row.id)
            assert (await node.machines.get(row.id)).state == "dead"
            report = await node.machines.bring_back(row.id, epoch=3)
            assert (report.rung, report.snapshot) == (4, "")
            assert await sh(node, row.id, check) == "same"
            assert await sh(node, row.id, "cat /proc/sys/kernel/random/boot_id; cat /run/recess/epoch") != boot_id
            assert await sh(node, row.id, "hostname; cat /run/recess/epoch") == "m1\n3"
            snap = await node.machines.suspend(row.id)
            assert not (config.machines_dir / row.id / "disk.kept").exists()
            assert (await node.machines.bring_back(row.id)).rung == 2
            assert await sh(node, row.id, check) == "same"
            await node.machines.pause(row.id)
            await node.close(detach=True)
            node = await LocalNode.open(config, progress=lines.append)
            assert (await node.machines.get(row.id)).state == "paused"
            assert (await node.machines.bring_back(row.id)).rung == 1
            assert await sh(node, row.id, check) == "same"
            await node.machines.kill(row.id, why="test")
            again, report = await node.machines.restore(snap.id, machine_id=row.id, disk_only=True)
            assert (again.id, report.rung) == (row.id, 4)
            assert await sh(node, row.id, check) == "same"
            await node.machines.remove(row.id, force=True)
            assert not (config.machines_dir / row.id).exists()
        finally:
            for left in await node.machines.list_machines(everything=True):
                await node.machines.remove(left.id, force=True)
            await node.close()
            shutil.rmtree(run_dir, ignore_errors=True)
