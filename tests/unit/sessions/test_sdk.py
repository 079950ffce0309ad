"""The in-guest SDK against the real runtime: hooks, holds, say, streaming, parallel tools, reconnection."""

import asyncio

import pytest

from recess.contextlog.contract import Delta
from recess.errors import BadInput
from recess.testing.session_agents import MARKS
from recess.testing.session_world import appears, texts, world

AGENT = (
    MARKS
    + """
import asyncio
from recess_agent import agent, tool

@tool
async def nap(name: str) -> str:
    mark("naps", name)
    while len((SHARED / "naps").read_text().split()) < 2:
        await asyncio.sleep(0.01)
    return "napped " + name

@tool
def broken() -> str:
    raise ValueError("no luck")

async def slow(text):
    for letter in text:
        yield letter
        await asyncio.sleep(0.03)

async def afresh():
    for letter in "wrong ":
        yield letter
        await asyncio.sleep(0.03)
    yield {"restart": True}
    for letter in "right":
        yield letter
        await asyncio.sleep(0.03)

async def cut():
    yield "half a "
    await asyncio.sleep(0.2)
    raise RuntimeError("the model went away")

@agent(image="base", idle="150ms", tools=[nap, broken])
async def me(s):
    async for turn in s:
        if turn.text == "stream":
            await s.stream(slow("a long reply"))
        elif turn.text == "afresh":
            await s.stream(afresh())
        elif turn.text == "cut":
            try:
                await s.stream(cut())
            except RuntimeError as exc:
                await s.say("sorry: " + str(exc))
        elif turn.text == "parallel":
            calls = [{"id": "x", "name": "nap", "arguments": {"name": "a"}}, {"id": "x", "name": "nap", "arguments": {"name": "b"}}]
            reply = await s.stream(answer(calls))
            await s.say(" ".join(await s.run_tools(reply, parallel=True)))
        elif turn.text == "at once":
            replies = await asyncio.gather(s.stream(slow("left")), s.stream(slow("right")), s.say("between"))
            await s.say(replies[0].text + " " + replies[1].text)
        elif turn.text == "wrong":
            calls = [{"id": "1", "name": "broken", "arguments": "{}"}, {"id": "2", "name": "nothing", "arguments": {}},
                     {"id": "3", "name": "nap", "arguments": "{no json"}]
            reply = await s.stream(answer(calls))
            await s.say(" | ".join(await s.run_tools(reply)))
        elif turn.text == "hold":
            asyncio.ensure_future(background(s))
            await s.say("working on it")
        elif turn.text == "whole":
            await s.stream(answer([]))
            await s.say(str(len(s.messages())) + s.messages(format="neutral")[-1]["text"])
        else:
            await s.say("hi")

async def answer(calls):
    return {"text": "well", "tool_calls": calls, "usage": {"total_tokens": 3}}

async def background(s):
    async with s.hold("indexing"):
        mark("holding")
        while not (SHARED / "enough").exists():
            await asyncio.sleep(0.01)

@me.on_suspend
def suspended(info):
    mark("hooks", repr(("suspend", info)))

@me.on_resume
async def resumed(info):
    mark("hooks", repr(("resume", info["rung"], info["stale"])))

@me.on_upgrade
def upgraded(info):
    mark("hooks", repr(("upgrade", sorted(info))))
"""
)


async def started(w, shared, **config):
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(shared)}, **config})
    return (await w.sessions.start("me")).id


async def test_hooks(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.say(s, "hello", turn=1)
        await w.until_state(s, "frozen")
        await w.say(s, "hello", turn=2)
        await w.until_state(s, "frozen")
        await w.sessions.deploy("me", {"agent.py": AGENT + "\n# newer\n"}, {"env": {"SHARED": str(tmp_path)}})
        await w.say(s, "hello", turn=3)
        told = (tmp_path / "hooks").read_text().splitlines()
        assert told[:3] == ["('suspend', {})", "('resume', 2, False)", "('suspend', {})"]
        assert told[-1] == "('upgrade', ['new', 'old'])"


async def test_deltas_are_streamed_and_then_replaced(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "stream")
        pieces = []
        async for item in w.sessions.follow(s):
            if isinstance(item, Delta):
                pieces.append(item.text)
            elif item.kind == "assistant":
                assert item.body["text"] == "a long reply"
                break
        assert len(pieces) > 1
        assert "a long reply".startswith("".join(pieces))
        assert await w.log.deltas(s) == []


async def test_a_reply_that_begins_afresh_is_shown_afresh(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "afresh")
        shown: dict[int, str] = {}
        async for item in w.sessions.follow(s):
            if isinstance(item, Delta):
                shown = {item.n: item.text} if item.n == 0 else {**shown, item.n: item.text}
            elif item.kind == "assistant":
                assert item.body["text"] == "right"
                break
        assert "right".startswith("".join(shown.values()))


async def test_a_broken_stream_leaves_a_partial_reply(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "cut", turn=1)
        said = [dict(e.body) for e in log if e.kind == "assistant"]
        assert said[0] == {"text": "half a ", "tool_calls": [], "part": 0, "partial": True}
        assert said[1]["text"] == "sorry: the model went away"


async def test_parallel_tools_with_equal_ids(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "parallel", turn=1)
        assert texts(log)[-1] == "napped a napped b"
        assert sorted(e.ref for e in log if e.kind == "tool.result") == ["x", "x~2"]


async def test_replies_at_once_are_two_replies(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "at once", turn=1)
        said = {e.body["part"]: e.body["text"] for e in log if e.kind == "assistant"}
        assert said == {0: "left", 1: "right", 2: "between", 3: "left right"}


async def test_tool_failures_are_results(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "wrong", turn=1)
        assert texts(log)[-1].startswith(
            "ValueError: no luck | there is no tool named 'nothing' | the arguments are not"
        )
        assert [e.body.get("error") for e in log if e.kind == "tool.result"] == [True] * 3


async def test_hold_of_background_work(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.say(s, "hold", turn=1)
        await appears(tmp_path / "holding")
        await asyncio.sleep(0.4)  # it is the absence of a freeze that is tested
        assert (await w.log.get(s)).state == "running"
        (tmp_path / "enough").touch()
        await w.until_state(s, "frozen")


async def test_whole_answers_and_formats(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "whole", turn=1)
        assert texts(log) == ["well", "2well"]
        assert log[3].body["usage"] == {"total_tokens": 3}


async def test_streams_are_cut_all_the_time_and_nothing_is_lost(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)

        async def scissors():
            while True:
                await asyncio.sleep(0.02)
                await w.machines.drop_streams()

        cutting = asyncio.create_task(scissors())
        try:
            for turn in range(1, 4):
                await w.say(s, "hello", turn=turn)
        finally:
            cutting.cancel()
        log = await w.entries(s)
        assert [e.kind for e in log if e.turn] == ["turn.start", "assistant", "turn.end"] * 3


async def test_an_eager_session_has_its_agent_ready_before_the_first_message(tmp_path):
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(tmp_path)}})
        s = (await w.sessions.start("me", eager=True)).id
        await w.until_state(s, "frozen")
        assert (await w.entries(s))[-1].body["job"]
        log = await w.say(s, "hello", turn=1)
        assert [e.body["agent_kept"] for e in log if e.kind == "machine.restore"] == [False, True]


async def test_an_eager_session_that_cannot_start_is_none_and_its_name_is_free():
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": AGENT})
        w.machines.fail_next["create"] = BadInput("no such image: bose")
        with pytest.raises(BadInput, match="bose"):
            await w.sessions.start("me", name="s1", eager=True)
        assert [row.state for row in await w.log.list_sessions()] == ["closed"]
        again = await w.sessions.start("me", name="s1", eager=True)
        await w.until_state(again.id, "frozen")
