"""Stored snapshots of real guests: compared, checked by a restore for real, kept small over many naps."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from pathlib import Path

import pytest

from recess.config import load_config
from recess.errors import HasDependents
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.snapshots.rewrite import FILES_MAX
from recess.testing.naps import take_naps
from tests.conftest import left_processes

SPEC = MachineSpec(memory_bytes=256 << 20, disk_bytes=1 << 30)
NAPS = 10
pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def config(tmp_path_factory, images_dir):
    home = tmp_path_factory.mktemp("stored") / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    run_dir = base / f"recess-s-{secrets.token_hex(4)}"
    yield load_config(
        {}, home=str(home), run_dir=str(run_dir), driver="qemu", snapshot_keep=1, snapshot_retention_s=0.0
    )
    left = left_processes(run_dir, home)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(run_dir, ignore_errors=True)
    assert not left


@pytest.fixture
async def node(config):
    opened = await LocalNode.open(config)
    yield opened
    for row in await opened.machines.list_machines(everything=True):
        await opened.machines.remove(row.id, force=True)
    await opened.close()


async def sh(node, ref, script):
    row = await node.machines.get(ref)
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["sh", "-c", script], cwd="/root"))
    out = b""
    async for _, data in job.output():
        out += data
    assert await job.wait() == 0, out
    return out.decode().strip()


async def test_what_changed_is_told_and_what_is_stored_comes_back(node):
    machines = node.machines
    row = await machines.create(SPEC, name="dev")
    await sh(node, "dev", "echo one > changes; echo x > goes; echo same > stays")
    one = await machines.snapshot("dev", name="dev:1")
    await sh(
        node,
        "dev",
        "echo two > changes; rm goes; echo n > new; echo t > /dev/shm/ram; setsid sleep 4242 >/dev/null 2>&1 &",
    )
    link = await machines.link(row.id)
    await link.exec(ExecRequest(argv=["sleep", "9999"], job_id="job"))
    two = await machines.snapshot("dev", name="dev:2")
    found = await machines.looks.diff("dev:1", "dev:2")
    assert set(found["files"]["added"]) >= {"/root/new", "/dev/shm/ram"}  # unwritten page cache and tmpfs are seen
    assert "/root/goes" in found["files"]["removed"]
    assert "/root/changes" in found["files"]["changed"]
    assert "/root/stays" not in found["files"]["changed"]
    added = found["processes"]["added"]
    assert all(any(name.endswith(words) for name in added) for words in ("sleep 4242", "sleep 9999")), added
    assert found["processes"]["removed"] == []
    assert found["memory"]["changed"] > 0
    for ref in ("dev:1", "dev:2"):
        checked = await machines.looks.check(ref)
        assert checked["equal"] > checked["moved_on"]
    assert [live.id for live in machines.fleet.all()] == [row.id]
    tree = {one["id"]: one for one in (await machines.views.tree())["nodes"]}
    assert tree[two.id]["parent"] == one.id
    if tree[one.id]["dependents"]:
        with pytest.raises(HasDependents):
            await machines.keeping.remove("dev:1")
    await machines.keeping.remove("dev:1", force=True)
    child, _ = await machines.restore("dev:2", name="child")
    assert await sh(node, child.id, "cat changes new") == "two\nn"


async def test_naps_stay_small_and_keep_everything(node):
    """The short form of `tools/naps.py`; how long restores take is judged there."""
    naps = await take_naps(node, NAPS, compare_every=NAPS // 2, restores=1)
    assert naps.compared == [NAPS // 2, NAPS]
    assert max(naps.layers) <= FILES_MAX
    assert naps.growth < 1.5
    assert (
        len([row for row in await node.machines.list_snapshots() if row.why == "suspend"]) == 2
    )  # the first is named, the last is the last
