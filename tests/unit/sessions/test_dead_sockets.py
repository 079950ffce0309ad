"""Connections that die while an agent is frozen: a real PostgreSQL pool, ten minutes of clock, and the hook that mends it."""

import asyncio

import psycopg
import pytest

from recess.testing.session_world import notes, texts, world

AGENT = """
import asyncio, os
import psycopg
from psycopg_pool import AsyncConnectionPool
from recess_agent import agent, tool

POOL = None
HEARD = []

async def pool():
    global POOL
    if POOL is None:
        POOL = AsyncConnectionPool(os.environ["DATABASE"], min_size=2, max_size=2, open=False)
        await POOL.open(wait=True)
    return POOL

@tool
async def count() -> str:
    async with (await pool()).connection() as connection:
        found = await connection.execute("select count(*) from pg_stat_activity where application_name = 'pool'")
        return str((await found.fetchone())[0])

async def model(messages):
    if messages[-1]["role"] == "tool":
        yield "there are " + messages[-1]["content"]
    else:
        yield {"tool_calls": [{"id": "c", "name": "count", "arguments": {}}]}

@agent(image="base", idle="1h", tools=[count])
async def me(s):
    async for turn in s:
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        await s.note(pid=os.getpid(), heard=list(HEARD))
"""
HOOK = """
@me.on_resume
async def mended(info):
    HEARD.append(info["rung"])
    await (await pool()).check()  # tries each connection and replaces the dead ones
"""


async def frozen_for_ten_minutes(w, s, url):
    """Put the session away, let ten minutes pass, and close the server's end of its connections as a server does to idle ones."""
    await w.sessions.suspend(s)
    w.clock.jump(600)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as server:
        mine = "from pg_stat_activity where application_name = 'pool'"
        await server.execute(f"select pg_terminate_backend(pid) {mine}")
        async with asyncio.timeout(30):
            while (await (await server.execute(f"select count(*) {mine}")).fetchone())[0]:
                await asyncio.sleep(0.01)


async def started(w, url, source):
    config = {"env": {"DATABASE": f"{url}{'&' if '?' in url else '?'}application_name=pool"}}
    await w.sessions.deploy("me", {"agent.py": source}, config)
    return (await w.sessions.start("me")).id


@pytest.mark.timeout(200)
async def test_a_pool_outlives_a_freeze_of_ten_minutes(postgres):
    url = postgres.database()
    async with world(idle_timeout_s=3600.0, hook_s=30.0) as w:
        s = await started(w, url, AGENT + HOOK)
        assert texts(await w.say(s, "how many?", turn=1))[-1] == "there are 2"
        await frozen_for_ten_minutes(w, s, url)
        log = await w.say(s, "and now?", turn=2)
        assert texts(log)[-1].startswith("there are "), "the tool has got a connection that works"
        assert [e.body.get("error") for e in log if e.kind == "tool.result"] == [None, None]
        before, after = notes(log)
        assert before["pid"] == after["pid"], "the same process, with its memory"
        assert after["heard"] == [2], "it was told on which rung it came back"
        assert "turn.cut" not in [e.kind for e in log]


@pytest.mark.timeout(200)
async def test_without_the_hook_a_dead_connection_is_a_tools_error_and_not_the_agents_end(postgres):
    url = postgres.database()
    async with world(idle_timeout_s=3600.0) as w:
        s = await started(w, url, AGENT)
        await w.say(s, "how many?", turn=1)
        await frozen_for_ten_minutes(w, s, url)
        log = await w.say(s, "and now?", turn=2)
        failed = [e.body for e in log if e.kind == "tool.result"][-1]
        assert failed["error"] is True
        assert "terminat" in failed["output"] or "closed" in failed["output"] or "lost" in failed["output"]
        assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done", "done"]
        before, after = notes(log)
        assert before["pid"] == after["pid"]
