"""A human takes a session over: the turn stops, nothing begins, what is sent waits, and handed back the agent goes on."""

import asyncio

import pytest

from recess.errors import IllegalState
from recess.testing.session_world import appears, coder_world, deploy_coder, kinds, machine_of, notes, texts, world


async def test_taken_over_in_the_middle_of_a_turn(tmp_path):
    async with coder_world(tmp_path, idle_timeout_s=60.0) as (w, s):
        await w.sessions.send(s, "work a")
        await appears(tmp_path / "work-a")
        row = await w.sessions.take(s, why="it is stuck")
        assert row.state == "running"
        (end,) = await w.entries(s, "turn.end")
        assert (end.body["status"], end.body["error"]) == ("cancelled", "a human took over: it is stuck")
        link = await w.machines.link(await machine_of(w, s))
        await link.write_file("/root/mended", b"by hand")
        await w.sessions.send(s, "hello")
        (tmp_path / "go-a").touch()
        supervisor = w.sessions._live[s]
        for _ in range(20):  # many looks, and none begins a turn
            supervisor.poke()
            await asyncio.sleep(0)
        assert kinds(await w.entries(s)).count("turn.start") == 1
        await w.sessions.hand_back(s, text="I mended it")
        await w.until(s, "turn.end", count=3)
        assert texts(await w.entries(s))[-2:] == ["hello to hello", "hello to I mended it"], "in the order they came"


async def test_it_is_still_the_humans_after_a_crash_and_after_a_freeze(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await w.sessions.take(s)
        await w.crash_server()
        await w.sessions.recover()
        await w.sessions.send(s, "two")
        await w.until_state(s, "frozen")
        await w.sessions.send(s, "three")  # brings no machine up
        await w.sessions.settled(s)
        assert (await w.log.get(s)).state == "frozen"
        assert kinds(await w.entries(s)).count("turn.start") == 1
        await w.sessions.hand_back(s)
        await w.until(s, "turn.end", count=3)
        assert texts(await w.entries(s)) == ["hello to one", "hello to two", "hello to three"]
        with pytest.raises(IllegalState, match="not taken over"):
            await w.sessions.hand_back(s)


async def test_code_that_never_starts_is_no_hindrance(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("coder", {"agent.py": "raise ValueError('no good')\n"})
        s = (await w.sessions.start("coder")).id
        await w.sessions.send(s, "one")
        await w.until(s, "turn.end", timeout_s=60)
        row = await w.sessions.take(s)
        machine = await w.machines.get(str(row.meta["machine"]))
        assert machine.state == "running"
        await deploy_coder(w, tmp_path, "2")
        await w.sessions.hand_back(s, text="now")
        end = await w.until(s, "turn.end", count=2, timeout_s=60)
        assert end.body["status"] == "done"
        assert notes(await w.entries(s))[-1]["version"] == "2"
