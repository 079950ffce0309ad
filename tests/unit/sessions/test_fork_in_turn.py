"""`session.fork` in the middle of a turn: log and machine together, once for each ref, whatever crashes in between."""

import asyncio

import pytest

from recess import crashpoints
from recess.testing.session_world import kinds, machine_of, world

AGENT = """
import pathlib
from recess_agent import SessionError, agent

@agent(image="base", idle="30s")
async def me(s):
    async for turn in s:
        if turn.text == "both ways":
            pathlib.Path("tried").write_text("so far")
            await s.say("thinking")
            child = await s.fork("the other way", name="other")
            same = await s.fork("the other way", ref="mine")
            again = await s.fork("the other way", ref="mine")
            await s.say(f"{child} {same == again} {child != same}")
        elif turn.text == "many":
            try:
                for n in range(70):
                    await s.fork(ref=str(n))
            except SessionError as error:
                await s.say(error.code)
        elif turn.text == "silent":
            await s.say(await s.fork())
        else:
            await s.say(turn.text + ": " + pathlib.Path("tried").read_text())
"""


async def begun(w):
    await w.sessions.deploy("me", {"agent.py": AGENT})
    return (await w.sessions.start("me")).id


def said(entries):
    return [e.body["text"] for e in entries if e.kind == "assistant"]


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    crashpoints.disarm_all()


async def test_both_ways_go_on(tmp_path):
    async with world() as w:
        s = await begun(w)
        log = await w.say(s, "both ways", turn=1)
        child, same, others = said(log)[-1].split()
        assert (same, others) == ("True", "True")
        forks = [e for e in log if e.kind == "fork"]
        assert [e.ref for e in forks][1:] == ["mine"]
        assert forks[0].body["child"] == child
        await w.until(child, "turn.end")
        theirs = await w.entries(child)
        assert said(theirs) == ["thinking", "the other way: so far"], "its past, its files, and its own message"
        assert (await w.log.get(child)).name == "other"
        assert await machine_of(w, child) != await machine_of(w, s)
        assert (await w.entries(child, "machine.restore"))[-1].body["stale"] is False


async def test_a_fork_without_a_message_waits(tmp_path):
    async with world() as w:
        s = await begun(w)
        child = said(await w.say(s, "silent", turn=1))[-1]
        row = await w.log.get(child)
        assert (row.state, row.parent, "machine" in row.meta) == ("frozen", s, False)
        assert not w.sessions.is_live(child)


async def test_a_turn_forks_only_so_often(tmp_path):
    async with world() as w:
        s = await begun(w)
        assert said(await w.say(s, "many", turn=1)) == ["bad_input"]
        assert kinds(await w.entries(s)).count("fork") == 64


@pytest.mark.parametrize("name", ["session.after_live_snapshot", "session.after_fork", "session.before_append"])
async def test_a_crash_in_a_fork_makes_no_second_child(tmp_path, name):
    async with world() as w:
        s = await begun(w)
        await w.sessions.send(s, "both ways", key="1")
        await w.until(s, "assistant")
        crashpoints.arm(name)
        async with asyncio.timeout(20):
            while crashpoints.is_armed(name):
                await asyncio.sleep(0.005)
        await w.crash_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        children = [e.body["child"] for e in log if e.kind == "fork"]
        assert len(children) == 2
        everything = await w.log.list_sessions()
        assert {one.id for one in everything} == {s, *children}
        for child in children:
            await w.until(child, "turn.end")
            assert said(await w.entries(child))[-1] == "the other way: so far"
            assert kinds(await w.entries(child)).count("user") == 2
