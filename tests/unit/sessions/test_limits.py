"""Runaway turns: over their time, steps or bytes they are ended and told, and the session is usable again."""

import asyncio

import pytest

from recess.contextlog.contract import Draft, Entry
from recess.errors import BadInput
from recess.sessions.agent_config import check_config
from recess.sessions.facts import fold
from recess.sessions.limits import Limits, Stopwatch, excess, parse_limits, stopwatch_of
from recess.testing.session_world import notes, texts, world
from recess.units import GIB, MIB

AGENT = """
import asyncio, os, time
from recess_agent import agent, tool

@tool
def look(n: int) -> str:
    return "seen " + str(n)

@tool
def shout(n: int) -> str:
    return "x" * n

async def model(messages, call):
    yield {"text": "again", "tool_calls": [{"id": "c", **call}]}

async def chatter():
    while True:
        yield "blah " * 200
        await asyncio.sleep(0)

@agent(image="base", idle="1h", tools=[look, shout])
async def me(s):
    done = []
    async for turn in s:
        word = turn.text.split()[0]
        if word == "sleepy":
            await s.ask("well?", timeout=3600)
        while word in ("loop", "shout"):
            args = {"loop": ("look", {"n": 1}), "shout": ("shout", {"n": 50000})}[word]
            reply = await s.stream(model(s.messages(), {"name": args[0], "arguments": args[1]}))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        while word == "deaf":
            time.sleep(0.01)
        if word == "slow" and not turn.cancelled:
            try:
                await s.stream(asyncio.sleep(3600))
            finally:
                pass
        if word == "chatter":
            await s.stream(chatter())
        done.append(turn.number)
        if not turn.cancelled:
            await s.say("done " + word)
        await s.note(done=list(done), pid=os.getpid())
"""


async def started(w, limits):
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"limits": limits})
    return (await w.sessions.start("me")).id


@pytest.mark.parametrize(
    ("word", "limits", "told"),
    [
        ("loop", {"steps": 12}, "more than 12 steps"),
        ("shout", {"output": "200k"}, "of output"),
        ("chatter", {"output": "200k"}, "of output"),
        ("slow", {"wall": "500ms"}, "at work for more than"),
    ],
)
async def test_a_runaway_turn_ends_by_itself_and_the_process_goes_on(word, limits, told):
    async with world(idle_timeout_s=60.0, cancel_s=30.0) as w:
        s = await started(w, limits)
        await w.say(s, "hello", turn=1)
        await w.sessions.send(s, word)
        end = await w.until(s, "turn.end", count=2, timeout_s=60)
        assert end.body["status"] == "failed"
        assert told in end.body["error"]
        log = await w.say(s, "hello again", turn=3)
        assert texts(log)[-1] == "done hello"
        before, after = notes(log)[0], notes(log)[-1]
        assert before["pid"] == after["pid"], "it stopped when it was told to: its memory is whole"
        assert after["done"] == [1, 2, 3]


async def test_one_that_does_not_listen_loses_its_process_and_no_message():
    async with world(idle_timeout_s=60.0, cancel_s=0.3, term_s=0.3) as w:
        s = await started(w, {"wall": "300ms"})
        await w.sessions.send(s, "deaf")
        await w.sessions.send(s, "hello")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert (end.body["status"], end.turn) == ("failed", 1)
        end = await w.until(s, "turn.end", count=2, timeout_s=60)
        assert end.body["status"] == "done"
        assert notes(await w.entries(s))[-1]["done"] == [2], "a new process"


async def test_waiting_is_no_work():
    async with world(idle_timeout_s=60.0, rest_s=60.0) as w:
        s = await started(w, {"wall": "5m"})
        await w.sessions.send(s, "sleepy")
        asked = await w.until(s, "ask")
        supervisor = w.sessions._live[s]
        while not supervisor.agent.resting or supervisor.watch.at_work:  # the actor has seen that it waits
            supervisor.poke()
            await asyncio.sleep(0.01)
        w.clock.jump(3000)
        await w.sessions.answer(s, asked.ref, "yes")
        end = await w.until(s, "turn.end", timeout_s=4000)
        assert end.body["status"] == "done"


async def test_the_count_goes_on_after_a_crash_of_the_server():
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, {"steps": 200})
        await w.sessions.send(s, "loop")
        await w.until(s, "tool.result", count=20, timeout_s=60)
        await w.crash_server()
        await w.sessions.recover()
        end = await w.until(s, "turn.end", timeout_s=120)
        assert "more than 200 steps" in end.body["error"]
        said = [e for e in await w.entries(s) if e.kind in ("assistant", "tool.start")]
        assert 200 <= len(said) <= 210


def entry(position, kind, body, turn=1):
    draft = Draft(kind, body, turn=turn)
    return Entry("s", position, draft.kind, draft.body, turn, "", "", 1, "v", 0.0, 1)


def test_what_counts():
    log = [
        entry(1, "turn.start", {"inbox": 0, "attempt": 1}),
        entry(2, "assistant", {"text": "12345", "tool_calls": []}),
        entry(3, "tool.start", {"name": "x"}),
        entry(4, "turn.cut", {"cause": "oom", "memory_bytes": 7}),
        entry(5, "turn.start", {"inbox": 0, "attempt": 2}),
        entry(6, "tool.result", {"output": "123"}),
    ]
    facts = fold(log)
    assert (facts.steps, facts.output_bytes) == (2, 5 + 2 + 1 + 3), "over all attempts"
    assert fold(log[:4]).oom_bytes == 7
    assert facts.oom_bytes == 0, "of the newest attempt only"
    assert fold([*log, entry(7, "turn.end", {"status": "done"})]).steps == 0
    assert excess(Limits(steps=1), facts, worked_s=0, streamed_bytes=0)
    assert not excess(Limits(steps=2), facts, worked_s=1e9, streamed_bytes=0)
    assert excess(Limits(output_bytes=12), facts, worked_s=0, streamed_bytes=2)
    assert not excess(Limits(output_bytes=12), facts, worked_s=0, streamed_bytes=1)
    assert excess(Limits(wall_s=5), facts, worked_s=5, streamed_bytes=0)


def test_limits_are_read_and_checked():
    assert parse_limits(None) == Limits() == check_config({}).limits
    found = check_config({"limits": {"wall": "30m", "steps": 200, "output": "64M"}}).limits
    assert found == Limits(1800.0, 200, 64 * MIB)
    assert Limits().output_bytes == GIB
    for bad in ({"step": 1}, {"steps": 0}, {"steps": True}, {"output": "0"}, {"wall": "-1s"}, [], "1h"):
        with pytest.raises(BadInput):
            parse_limits(bad or ["x"])


def test_memory_grows_once():
    plain = check_config({"memory": "256M"})
    assert plain.larger_bytes(256 * MIB) == 512 * MIB
    assert plain.larger_bytes(512 * MIB) == 0
    asked = check_config({"memory": "256M", "memory_most": "384M"})
    assert asked.larger_bytes(256 * MIB) == 384 * MIB
    assert check_config({"memory": "256M", "memory_most": "256M"}).larger_bytes(256 * MIB) == 0
    assert check_config({"backend": "process"}).larger_bytes(1) == 0


def test_the_stopwatch():
    watch = Stopwatch(since_s=100.0).tick(100.0, turn=1, at_work=True).tick(103.0, turn=1, at_work=False)
    assert watch.tick(1000.0, turn=1, at_work=True).seconds == 3.0
    assert (
        stopwatch_of(watch.saved(), 5000.0)
        .tick(5000.0, turn=1, at_work=True)
        .tick(5001.0, turn=1, at_work=True)
        .seconds
        == 4.0
    )
    assert watch.tick(1000.0, turn=2, at_work=True).seconds == 0.0, "another turn begins at nothing"
    for junk in (None, "", [1], ["x", 1.0], {"a": 1}):
        assert stopwatch_of(junk, 1.0).seconds == 0.0
