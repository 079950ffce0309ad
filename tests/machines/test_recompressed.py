"""Real guests over layers that were recompressed: put away, brought back, snapshotted again, and swapped in mid-restore."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from pathlib import Path

import pytest

from recess.config import load_config
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from tests.conftest import left_processes

SPEC = MachineSpec(memory_bytes=256 << 20, disk_bytes=1 << 30)
pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]


@pytest.fixture
async def node(tmp_path, images_dir):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    run_dir = base / f"recess-r-{secrets.token_hex(4)}"
    how = {"recompress_after_s": 0.001, "recompress_level": 9, "recompress_frame_bytes": 131072}
    how["page_files_bytes"] = 0  # nothing is at hand: every restore reads the layers
    opened = await LocalNode.open(load_config({}, home=str(home), run_dir=str(run_dir), **{"driver": "qemu", **how}))
    yield opened
    for row in await opened.machines.list_machines(everything=True):
        await opened.machines.remove(row.id, force=True)
    await opened.close()
    left = left_processes(run_dir, home)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(run_dir, ignore_errors=True)
    assert not left


async def sh(node, ref, script):
    row = await node.machines.get(ref)
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["sh", "-c", script], cwd="/root"))
    out = b""
    async for _, data in job.output():
        out += data
    assert await job.wait() == 0, out
    return out.decode().strip()


def layers(node, folder):
    return {path.name for path in (node.config.blobs_dir / folder).glob("lyr_*")}


async def test_memory_comes_back_from_recompressed_layers(node):
    machines = node.machines
    row = await machines.create(SPEC, name="dev")
    fill = "(seq 1 1000000; head -c 1000 /dev/urandom) > /dev/shm/held; sha256sum < /dev/shm/held"
    held, boot = await sh(node, "dev", fill), await sh(node, "dev", "cat /proc/sys/kernel/random/boot_id")
    await machines.suspend("dev")
    written = layers(node, "layers")
    counts = await machines.keeping.recompress()
    assert counts["recompressed"] == len(written) >= 2  # the template's too
    assert counts["bytes"] > 0
    assert layers(node, "layers") == set()
    assert layers(node, "recoded") == written
    report = await machines.resume("dev")
    assert report is not None
    assert await sh(node, "dev", "sha256sum < /dev/shm/held") == held
    assert await sh(node, "dev", "cat /proc/sys/kernel/random/boot_id") == boot  # restored, not booted

    # A snapshot over recompressed layers; then they are swapped while a restore is reading.
    await sh(node, "dev", "echo more >> /dev/shm/held")
    held = await sh(node, "dev", "sha256sum < /dev/shm/held")
    taken = await machines.snapshot(row.id)
    await machines.verify_snapshot(taken.id)
    _, counts = await asyncio.gather(machines.restore(taken.id, name="child"), machines.keeping.recompress())
    assert counts["recompressed"] >= 1
    assert await sh(node, "child", "sha256sum < /dev/shm/held") == held
    assert layers(node, "layers") == set()
    await machines.restore(taken.id, name="again")
    assert await sh(node, "again", "sha256sum < /dev/shm/held") == held
    assert (await machines.verify_snapshot(taken.id))["pages"] > 0
