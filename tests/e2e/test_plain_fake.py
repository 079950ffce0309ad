"""A session's plain machine is seen and used as other machines are: listed, shown, reached, read, ended, removed."""

from __future__ import annotations

import asyncio

import pytest

from recess.cli.verbs.ps import PLAIN, shown
from recess.config import load_config
from recess.errors import IllegalState, NotFound, Unsupported
from recess.guestlink.link import ExecRequest
from recess.machines.loglines import Wanted
from recess.node import everywhere
from recess.node.local import LocalNode

AGENT = """
from recess_agent import agent

@agent(backend="process", idle="1h")
async def me(s):
    async for turn in s:
        print("heard " + turn.text, flush=True)
        await s.say("heard " + turn.text)
"""


async def ended(node: LocalNode, session: str, turn: int) -> None:
    async with asyncio.timeout(60):
        async for item in node.sessions.follow(session):
            if getattr(item, "kind", "") == "turn.end" and item.turn == turn:
                return


async def test_the_life_of_a_plain_machine(tmp_path) -> None:
    config = load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake")
    node = await LocalNode.open(config)
    try:
        await node.sessions.deploy("me", {"agent.py": AGENT})
        session = (await node.sessions.start("me")).id
        await node.sessions.send(session, "hi")
        await ended(node, session, 1)
        (row,) = await everywhere.list_machines(node, everything=False)
        assert (row.driver, row.session, row.state) == ("process", session, "running")
        table = shown({**row.__dict__, "spec": row.spec.__dict__, "meta": dict(row.meta)}, whole=False)
        assert (table["Image"], table["Status"].split()[0]) == (PLAIN, "Up")
        assert (await everywhere.get_machine(node, row.id[:9])).id == row.id, "by the beginning of its id, too"
        async with everywhere.reach(node, row.id, "exec") as (_, link):
            job = await link.exec(ExecRequest(argv=["sh", "-c", "pwd; exit 3"], cwd="/root"))
            output = b"".join([data async for _, data in job.output()])
            assert await job.wait() == 3
            with pytest.raises(Unsupported, match="no terminal"):
                await link.exec(ExecRequest(argv=["sh"], tty=True))
        assert output.strip().endswith(b"/root/root")
        said = b"heard hi\n"
        kept = await everywhere.output_of(node, row.id, Wanted(tail=1))
        assert (kept.data, kept.stdout, kept.stderr) == (said, len(said), 0)
        with pytest.raises(Unsupported, match="without times"):
            await everywhere.output_of(node, row.id, Wanted(timestamps=True))
        with pytest.raises(Unsupported, match="cannot start"):
            await everywhere.act_on_plain(node, row.id, "start")
        assert await everywhere.act_on_plain(node, "mch_of_nobody", "stop") is None
        assert (await everywhere.act_on_plain(node, row.id, "pause")).state == "paused"
        assert (await everywhere.act_on_plain(node, row.id, "unpause")).state == "running"
        with pytest.raises(IllegalState, match="running"):
            await everywhere.remove(node, row.id, force=False)
        await everywhere.remove(node, row.id, force=True)
        with pytest.raises(NotFound):
            await everywhere.get_machine(node, row.id)
        await node.sessions.send(session, "again")
        await ended(node, session, 2)  # its session goes on with another
        assert [one.session for one in await everywhere.list_machines(node, everything=False)] == [session]
    finally:
        await node.close(detach=False)
