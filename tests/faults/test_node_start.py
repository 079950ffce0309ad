"""Nodes that start on what is broken, and nodes after a server that was killed: typed errors, nothing held, nothing lost."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from recess.config import Config, load_config
from recess.errors import Corrupt, Incompatible, RecessError
from recess.guestlink.link import ExecRequest
from recess.node.local import LocalNode
from recess.testing.machine_room import SMALL

SERVER = """
import asyncio, sys
from recess.config import load_config
from recess.guestlink.link import ExecRequest
from recess.node.local import LocalNode
from recess.testing.machine_room import SMALL

async def main():
    config = load_config({}, home=sys.argv[1], run_dir=sys.argv[2], driver="fake", crash_point=sys.argv[3])
    node = await LocalNode.open(config)
    row = await node.machines.create(SMALL, name="dev")
    link = await node.machines.link(row.id)
    for number in range(3):
        await (await link.exec(ExecRequest(argv=["sh", "-c", f"echo {number} > /root/n"]))).wait()
        await node.machines.snapshot("dev", name=f"s{number}")
    await node.machines.suspend("dev")

asyncio.run(main())
"""


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake")


def run_server(config: Config, crash_point: str) -> int:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", SERVER, str(config.home), str(config.run_dir), crash_point]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


async def number_in(node: LocalNode) -> str:
    await node.machines.resume("dev")
    row = await node.machines.get("dev")
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["cat", "/root/n"]))
    return b"".join([data async for _, data in job.output()]).decode().strip()


@pytest.mark.parametrize(
    ("point", "names", "number"),
    [
        ("machines.stored:1", {"s0"}, "0"),
        ("machines.snapshot_row:1", {"s0", "s1"}, "1"),
        ("machines.snapshot_row:3", {"s0", "s1", "s2", ""}, "2"),
        ("machines.evicted", {"s0", "s1", "s2", ""}, "2"),
    ],
)
async def test_a_server_killed_at_any_step_of_a_snapshot(config, point, names, number):
    assert run_server(config, point) == -signal.SIGKILL
    node = await LocalNode.open(config)
    assert {s.name for s in await node.machines.list_snapshots()} == names
    assert (await node.machines.get("dev")).state == "suspended"
    assert await number_in(node) == number
    for snapshot in await node.machines.list_snapshots():
        await node.machines.verify_snapshot(snapshot.id)
    await node.machines.collect(grace_s=0.0)
    await node.close(detach=False)


async def test_a_server_killed_while_it_makes_a_machine(config):
    assert run_server(config, "machines.started") == -signal.SIGKILL
    node = await LocalNode.open(config)
    assert await node.machines.list_machines(everything=True) == []
    assert list(config.machines_dir.iterdir()) == []
    await node.machines.create(SMALL, name="dev")
    await node.close(detach=False)


async def refused(config: Config, error: type[RecessError]) -> RecessError:
    """Open must fail with this error, and leave the home free for the next try."""
    for _ in range(2):
        with pytest.raises(error) as caught:
            await LocalNode.open(config)
    assert "\n" not in caught.value.message
    return caught.value


async def test_a_database_of_a_newer_version(config):
    await (await LocalNode.open(config)).close()
    with sqlite3.connect(config.database_path) as db:
        db.execute(
            "INSERT INTO recess_migration SELECT room, 999, 'from the future', hash FROM recess_migration LIMIT 1"
        )
    db.close()
    await refused(config, Incompatible)


async def test_a_row_that_lies_is_named_and_keeps_nobody_from_working(config):
    node = await LocalNode.open(config)
    row = await node.machines.create(SMALL, name="dev")
    other = await node.machines.create(SMALL, name="other")
    await node.machines.suspend("other")
    await node.close()
    with sqlite3.connect(config.database_path) as db:
        db.execute("UPDATE catalog_machine SET spec = '{not json' WHERE id = ?", (row.id,))
    db.close()
    node = await LocalNode.open(config)
    assert node.recovered["damaged"] == 1
    shown = {one.id: one.state for one in await node.machines.list_machines(everything=True)}
    assert shown == {row.id: "damaged", other.id: "suspended"}
    with pytest.raises(Corrupt, match=row.id):
        await node.machines.get("dev")
    assert (await node.machines.bring_back("other")).rung == 2
    await node.close(detach=False)


async def test_a_home_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    blocked = load_config({}, home=tmp_path / "file" / "home", run_dir=tmp_path / "run", driver="fake")
    error = await refused(blocked, RecessError)
    assert "RECESS_HOME" in error.hint
