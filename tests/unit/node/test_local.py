"""The composition root with the fake driver: opening, locking, closing, coming back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from recess.broker import OpenGate
from recess.config import Config, load_config
from recess.drivers.fake import FakeDriver
from recess.errors import BadInput, HomeLocked, Incompatible, MissingTool, NotFound, Refused
from recess.guestlink.link import ExecRequest
from recess.node.gate import NodeGate
from recess.node.local import LocalNode, make_folders
from recess.node.lock import HomeLock
from recess.testing.machine_room import SMALL


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake")


async def test_open_create_exec_close(config):
    lines: list[str] = []
    node = await LocalNode.open(config, progress=lines.append)
    assert node.info()["driver"] == "fake"
    row = await node.machines.create(SMALL, name="dev")
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["echo", "hi"]))
    assert [data async for _, data in job.output()] == [b"hi\n"]
    assert node.egress(row.id)["decisions"] == []
    assert lines
    await node.close(detach=False)
    await node.close()

    again = await LocalNode.open(config)
    assert (await again.machines.get("dev")).state == "suspended"
    await again.machines.resume("dev")
    assert (await again.machines.get("dev")).state == "running"
    await again.close()


async def test_machines_of_a_driver_that_forgot_them_fall_at_the_next_start(config):
    node = await LocalNode.open(config)
    await node.machines.create(SMALL, name="plain")
    await node.machines.create(SMALL, name="saved")
    await node.machines.snapshot("saved")
    await node.close(detach=True)
    node = await LocalNode.open(config)
    assert node.recovered["lost"] == 2
    assert (await node.machines.get("plain")).state == "dead"
    assert (await node.machines.get("saved")).state == "suspended"
    await node.close()


async def test_folders_are_private(config):
    node = await LocalNode.open(config)
    for folder in (config.home, config.run_dir, config.machines_dir):
        assert folder.stat().st_mode & 0o077 == 0
    await node.close()
    config.run_dir.chmod(0o755)
    make_folders(config)
    assert config.run_dir.stat().st_mode & 0o077 == 0


async def test_a_run_directory_that_is_no_folder_of_ours_is_refused(config, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    config.run_dir.symlink_to(target)
    with pytest.raises(Refused):
        make_folders(config)


async def test_two_servers_on_one_home(config):
    node = await LocalNode.open(config)
    with pytest.raises(HomeLocked, match=str(os.getpid())):
        await LocalNode.open(config)
    await node.close()
    await (await LocalNode.open(config)).close()


def test_the_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys, pathlib; from recess.node.lock import HomeLock; HomeLock(pathlib.Path(sys.argv[1])).acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    src = str(Path(__file__).parents[3] / "src")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": src},
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(HomeLocked, match=str(holder.pid)):
        HomeLock(tmp_path).acquire()
    holder.kill()
    holder.communicate()
    lock = HomeLock(tmp_path)
    lock.acquire()
    lock.release()
    lock.release()


async def test_a_start_that_fails_leaves_the_home_free(config):
    with pytest.raises(BadInput, match="driver"):
        await LocalNode.open(replace(config, driver="vmware"))
    config.database_path.write_bytes(b"this is no database" * 100)
    from recess.errors import Corrupt

    with pytest.raises((Corrupt, Incompatible)):
        await LocalNode.open(config)
    config.database_path.unlink()
    await (await LocalNode.open(config)).close()


async def test_doctor_runs_a_guest_and_says_the_level(config):
    node = await LocalNode.open(config)
    report = await node.doctor()
    assert report["level"] == "forks"
    assert all({"name", "ok", "detail", "hint"} <= set(c) for c in report["checks"])
    assert await node.machines.list_machines(everything=True) == []
    await node.close()


async def test_images_of_an_empty_home(config):
    node = await LocalNode.open(config)
    assert await node.list_images() == []
    with pytest.raises(NotFound):
        await node.get_image("base")
    with pytest.raises(NotFound):
        await node.remove_image("base")
    await node.close()


async def test_the_gate_fails_closed_for_sessions_until_they_are_there():
    gate = NodeGate()
    assert gate.may_act("mch_1", 0)
    assert not gate.may_act("mch_1", 3)
    await gate.wait_lost("mch_1", 3)
    gate.bind(OpenGate())
    assert gate.may_act("mch_1", 3)
    waiting = asyncio.create_task(gate.wait_lost("mch_1", 3))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_doctor_looks_at_the_driver_anew(config, monkeypatch):
    asked = []

    async def gone(self, *, fresh=False):
        asked.append(fresh)
        raise MissingTool("no QEMU here any more", hint="install it")

    monkeypatch.setattr(FakeDriver, "probe", gone)
    node = await LocalNode.open(config)
    report = await node.doctor()
    assert asked == [True]
    assert (report["ok"], report["level"]) == (False, "none")
    assert report["checks"][-1]["hint"] == "install it"
    await node.close()
