"""`resume` returns when the machine answers, whatever the session was just doing, or says why it cannot."""

import asyncio

import pytest

from recess.errors import IllegalState, Timeout, Unavailable
from recess.testing.session_world import coder_world, deploy_coder, machine_of, notes


async def answers(w, s):
    """Tell whether the session runs and its machine's link can be had."""
    row = await w.log.get(s)
    return row.state == "running" and await (await w.machines.link(str(row.meta["machine"]))).ping() == 0.0


@pytest.mark.parametrize("method", ["snapshot", "evict"])
async def test_a_session_that_is_just_being_put_away_is_brought_back(tmp_path, method):
    async with coder_world(tmp_path) as (w, s):
        original, resumed = getattr(w.machines, method), []

        async def slowly(ref, **kwargs):
            if not resumed:
                resumed.append(asyncio.create_task(w.sessions.resume(s)))
                await asyncio.sleep(0)  # the resume has looked, and waits
                assert not resumed[0].done()
            return await original(ref, **kwargs)

        setattr(w.machines, method, slowly)
        await w.say(s, "hi", turn=1)
        async with asyncio.timeout(10):
            while not resumed:
                await w.log.wait(s, (await w.log.get(s)).head, 0.05)
            assert (await resumed[0]).state == "running"
            assert await answers(w, s)
        await w.say(s, "again", turn=2)
        both = notes(await w.entries(s))
        assert both[0]["pid"] == both[1]["pid"]


async def test_the_end_of_the_eviction_is_awaited(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        original, evicting, go = w.machines.evict, asyncio.Event(), asyncio.Event()

        async def evict(ref, **kwargs):
            evicting.set()
            await go.wait()
            await original(ref, **kwargs)

        w.machines.evict = evict
        await w.say(s, "hi", turn=1)
        await asyncio.wait_for(evicting.wait(), 10)
        assert (await w.log.get(s)).state == "frozen"
        resume = asyncio.create_task(w.sessions.resume(s))
        done, _ = await asyncio.wait({resume}, timeout=0.1)
        assert not done, "a session whose machine is being ended is not up"
        go.set()
        assert (await asyncio.wait_for(resume, 10)).state == "running"
        assert await answers(w, s)


async def test_a_parked_session_is_unparked_and_a_wish_to_suspend_is_overruled(tmp_path):
    async with coder_world(tmp_path, park_s=30.0) as (w, s):
        await w.say(s, "hi", turn=1)
        await w.until_state(s, "parked")
        assert (await w.sessions.resume(s)).state == "running"
        await w.sessions.send(s, "work a", key="2")
        await w.until(s, "tool.start")
        suspend = asyncio.create_task(w.sessions.suspend(s, timeout_s=10))
        await asyncio.sleep(0)
        assert (await w.sessions.resume(s)).state == "running"
        with pytest.raises(IllegalState, match="resumed meanwhile"):
            await suspend
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end", count=2)


async def test_a_machine_that_died_unseen_is_brought_back(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await deploy_coder(w, tmp_path, "quiet", idle="60s")
        await w.say(s, "hi", turn=1)
        link, asked = await w.machines.link(await machine_of(w, s)), []

        async def ping(timeout_s=5.0):
            asked.append(timeout_s)
            raise Unavailable("no answer")

        link.ping = ping
        assert (await w.sessions.resume(s)).state == "running"
        assert asked
        assert await answers(w, s)
        assert (await w.entries(s, "machine.restore"))[-1].body["rung"] == 4  # it had no snapshot: its disk


async def test_what_stands_in_the_way_is_raised(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        w.machines.fail_next["create"] = IllegalState("no room for another machine")
        with pytest.raises(IllegalState, match="no room"):
            await w.sessions.resume(s)
        await w.sessions.resume(s)


async def test_a_command_for_a_supervisor_that_has_ended_is_refused_at_once(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "hi", turn=1)
        supervisor = w.sessions._live[s]
        await w.until_state(s, "frozen")
        with pytest.raises(Timeout):
            await asyncio.wait_for(supervisor.command(supervisor.answering), 5)
