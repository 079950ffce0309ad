"""An agent as a plain process under a whole node: the same file, the same log, and what is not kept is said."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from recess.config import load_config
from recess.errors import BadInput
from recess.node.local import LocalNode

AGENT = """
import os, pathlib
from recess_agent import agent, tool

@tool
def put(name: str) -> str:
    pathlib.Path(name).write_text("kept")
    return os.getcwd()

@agent(backend="process", idle="IDLE", tools=[put])
async def me(s):
    seen = 0
    async for turn in s:
        seen += 1
        if turn.text.startswith("put "):
            await s.run_tools(await s.stream(call(turn.text[4:])))
        files = ",".join(sorted(one.name for one in pathlib.Path().iterdir()))
        await s.say(f"{os.getpid()} {seen} {len(s.messages())} {files}")

async def call(name):
    return {"text": "", "tool_calls": [{"id": f"c-{name}", "name": "put", "arguments": {"name": name}}]}
"""


@pytest.fixture
def config(tmp_path):
    return load_config({}, home=tmp_path / "h", run_dir=tmp_path / "r", driver="fake")


@asynccontextmanager
async def opened(config, *, detach=True):
    node = await LocalNode.open(config)
    try:
        yield node
    finally:
        await node.close(detach=detach)


async def say(node, session, text):
    """Send a message; return what the agent said of itself at the turn's end: pid, turns seen, messages, files."""
    before = (await node.log.get(session)).head
    await node.sessions.send(session, text)
    async with asyncio.timeout(60):
        async for entry in node.sessions.follow(session, after=before):
            if getattr(entry, "kind", "") == "assistant" and entry.body["text"]:
                said = entry.body["text"]
            if getattr(entry, "kind", "") == "turn.end":
                assert entry.body["status"] == "done", entry
                pid, seen, messages, *files = said.split(" ")
                return int(pid), int(seen), int(messages), files[0] if files else ""
    raise AssertionError("no end")


async def restores(node, session):
    return [e.body for e in await node.sessions.read(session) if e.kind == "machine.restore"]


async def end(node, session):
    await node.sessions.close(session)


async def test_put_away_it_keeps_its_files_and_its_log_and_says_so(config):
    async with opened(config) as node:
        await node.sessions.deploy("me", {"agent.py": AGENT.replace("IDLE", "1h")})
        session = (await node.sessions.start("me")).id
        first = await say(node, session, "put a.txt")
        assert (first[1], first[3]) == (1, "a.txt")
        assert (await say(node, session, "more"))[:2] == (first[0], 2)
        assert (await node.sessions.suspend(session)).state == "frozen"
        pid, seen, messages, files = await say(node, session, "again")
        assert pid != first[0]
        assert (seen, files) == (1, "a.txt")
        assert messages > 5  # the log is whole
        told = (await restores(node, session))[-1]
        assert (told["rung"], told["stale"], told["agent_kept"]) == (4, False, False)
        assert "keeps no memory" in told["why"]
        assert told["lost"] == "processes and memory of before; no file"
        await end(node, session)


async def test_the_process_outlives_its_server(config):
    async with opened(config) as node:
        await node.sessions.deploy("me", {"agent.py": AGENT.replace("IDLE", "1h")})
        session = (await node.sessions.start("me")).id
        first = await say(node, session, "one")
    async with opened(config) as node:
        assert (await say(node, session, "two"))[:2] == (first[0], 2)
        assert [one["rung"] for one in await restores(node, session)] == [5, 1]
        await end(node, session)


async def test_a_fork_has_the_files_and_the_log(config):
    async with opened(config) as node:
        await node.sessions.deploy("me", {"agent.py": AGENT.replace("IDLE", "1h")})
        session = (await node.sessions.start("me")).id
        await say(node, session, "put a")
        child = (await node.sessions.fork(session)).id
        await say(node, session, "put b")
        assert (await say(node, child, "look"))[3] == "a"
        assert (await restores(node, child))[-1]["rung"] == 4
        await end(node, session)
        await end(node, child)


def test_rules_that_nobody_would_hold_are_refused():
    from recess.sessions.agent_config import check_config

    assert check_config({"backend": "process"}).machine_spec("s").labels["backend"] == "process"
    assert "backend" not in check_config({}).machine_spec("s").labels
    for wrong in ({"allow": ["a.b"]}, {"routes": {"llm": "https://a.b"}}, {"network": "none"}):
        with pytest.raises(BadInput, match="no rule holds"):
            check_config({"backend": "process", **wrong})
    with pytest.raises(BadInput, match="backend must be one of"):
        check_config({"backend": "cloud"})
