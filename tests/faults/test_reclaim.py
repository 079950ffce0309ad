"""What a session took is given back: after it was closed and collected, home and run folder hold what they held before, also when its
server died in between; the log stays, sealed."""

import asyncio
import os

import pytest

from recess.config import load_config
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.session_world import JumpClock

AGENT = "from recess_agent import agent\n\n@agent(image='base', idle='0.1s')\nasync def coder(s):\n    async for turn in s:\n        pass\n"
A_WEEK_S = 7 * 86400.0
LOG = ("recess.db", "bodies", "blobs/log", "server.lock", "blobs/.tmp")


@pytest.fixture
def config(tmp_path):
    return load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake", idle_timeout_s=0.1)


def held(config):
    """Return path -> bytes of all files of home and run folder but the log's own."""
    found = {}
    for root in (config.home, config.run_dir):
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                short = os.path.relpath(path, root)
                if not short.startswith(LOG):
                    found[f"{root.name}/{short}"] = os.lstat(path).st_size
    return found


async def frozen(node, session):
    while (row := await node.sessions.get(session)).state != "frozen":
        await node.log.wait(session, row.head, 5.0)
    await node.sessions.settled(session)


async def baseline(node):
    """A node with its template and nothing else."""
    await node.sessions.deploy("coder", {"agent.py": AGENT})
    row = await node.machines.create(MachineSpec(image="base"))
    await node.machines.remove(row.id, force=True)
    await node.machines.keeping.collect(grace_s=-60.0)


async def collected(node, clock):
    """What the reaper does, when all that is kept for a while has become old. Twice: the jump wakes the node's own round too,
    and what that recompresses while this one sweeps is for the next to take."""
    clock.jump(A_WEEK_S)
    await node.machines.tidy()
    clock.jump(A_WEEK_S)
    await node.machines.tidy()


async def test_a_closed_session_gives_everything_back_but_its_log(config):
    clock = JumpClock()
    node = await LocalNode.open(config, clock=clock)
    await baseline(node)
    before = held(config)
    ids = []
    for _ in range(3):
        row = await node.sessions.start("coder", eager=True)
        await frozen(node, row.id)
        child = await node.sessions.fork(row.id, eager=True)
        await frozen(node, child.id)
        ids += [row.id, child.id]
    grown = held(config)
    assert sum(grown.values()) > sum(before.values())
    for session in ids:
        await node.sessions.close(session)
    await collected(node, clock)
    assert held(config) == before
    assert await node.machines.list_machines(everything=True) == []
    assert {(await node.sessions.get(s)).state for s in ids} == {"closed"}
    assert all([await node.sessions.read(s) for s in ids])
    await node.close(detach=False)


async def test_what_a_server_that_died_left_of_a_session_is_given_back(config):
    """The server is lost with a session's machine running: its successor takes it over, and closing it frees all."""
    clock = JumpClock()
    node = await LocalNode.open(config, clock=clock)
    await baseline(node)
    before = held(config)
    row = await node.sessions.start("coder", name="mine", eager=True)
    await frozen(node, row.id)
    await node.sessions.resume(row.id)
    await node.sessions.abandon()  # nothing is written
    await node.close(detach=True)

    after = await LocalNode.open(config, clock=clock)
    await after.sessions.close(row.id)
    await collected(after, clock)
    assert held(config) == before
    again = await after.sessions.start("coder", name="mine")  # its name is free
    assert again.id != row.id
    await after.close(detach=False)
    assert held(config).keys() <= before.keys()
    assert asyncio.all_tasks() == {asyncio.current_task()}
