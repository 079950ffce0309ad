"""Stop, steer, queue and interrupt in the middle of a turn: nothing said is lost, memory and machine stay."""

import asyncio

import pytest

from recess.contextlog.transcript import check_transcript, messages
from recess.errors import BadInput, IllegalState
from recess.testing.session_agents import MARKS
from recess.testing.session_world import appears, kinds, texts, world

AGENT = (
    MARKS
    + """
import asyncio, time
from recess_agent import agent, tool

LIFE = []

@tool
async def wait(name: str) -> str:
    mark("wait-" + name)
    while not (SHARED / ("go-" + name)).exists():
        await asyncio.sleep(0.01)
    return "waited"

@tool(effect="once")
async def pay(name: str) -> str:
    mark("pay")
    while not (SHARED / "go-pay").exists():
        await asyncio.sleep(0.01)
    return "paid"

def deaf(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)

async def model(messages):
    asked = [m["content"] for m in messages if m["role"] == "user" and not m["content"].startswith("[recess]")]
    last = messages[-1]
    words = asked[-1].split()
    if last["role"] == "user" and words[0] in ("wait", "pay", "both"):
        names = {"both": ["wait", "pay"]}.get(words[0], [words[0]])
        yield {"text": "well", "tool_calls": [
            {"id": "c" + str(i), "name": n, "arguments": {"name": words[1]}} for i, n in enumerate(names)]}
    elif last["role"] == "user" and words[0] == "talk":
        mark("talking")
        yield "let me think "
        while not (SHARED / "go-talk").exists():
            await asyncio.sleep(0.01)
        yield "about it"
    else:
        yield "answer to " + " + ".join(asked)

@agent(image="base", idle="30s", tools=[wait, pay])
async def me(s):
    count = 0
    async for turn in s:
        count += 1
        if turn.text.startswith("deaf"):
            mark("deaf")
            deaf(60)
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply, parallel=turn.text.startswith("both"))
        await s.note(pid=os.getpid(), count=count, cancelled=turn.cancelled)
"""
)


async def started(w, shared):
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(shared)}})
    return (await w.sessions.start("me")).id


def life(log):
    return [(e.body["count"], e.body["cancelled"]) for e in log if e.kind == "note"]


def ends(log):
    return [e.body["status"] for e in log if e.kind == "turn.end"]


async def test_a_tool_is_stopped_and_the_same_coroutine_goes_on(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.say(s, "hello", turn=1)
        await w.sessions.send(s, "wait a", key="2")
        await appears(tmp_path / "wait-a")
        await w.sessions.cancel(s, reason="enough")
        end = await w.until(s, "turn.end", count=2)
        assert (end.body["status"], end.body["error"]) == ("cancelled", "enough")
        log = await w.say(s, "still there?", turn=3)
        assert life(log) == [(1, False), (2, True), (3, False)]
        assert len({e.body["pid"] for e in log if e.kind == "note"}) == 1
        (result,) = [e.body for e in log if e.kind == "tool.result"]
        assert result == {"output": "cancelled: it may have been done in part", "error": True}
        assert check_transcript(messages(log)) == []
        assert ends(log) == ["done", "cancelled", "done"]
        assert "turn.cut" not in kinds(log)


async def test_a_reply_is_stopped_and_what_came_of_it_is_kept(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "talk", key="1")
        await appears(tmp_path / "talking")
        await w.sessions.cancel(s, turn=1)
        await w.until(s, "turn.end")
        log = await w.entries(s)
        said = [dict(e.body) for e in log if e.kind == "assistant"]
        assert said == [{"text": "let me think ", "tool_calls": [], "part": 0, "partial": True}]
        assert life(log) == [(1, True)]


async def test_a_once_call_is_let_finish(tmp_path):
    async with world(cancel_s=20.0) as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "both a", key="1")
        await appears(tmp_path / "pay")
        await w.sessions.cancel(s)
        await w.until(s, "tool.result")
        (tmp_path / "go-pay").touch()
        await w.until(s, "turn.end")
        outputs = {e.ref: e.body["output"] for e in await w.entries(s) if e.kind == "tool.result"}
        assert sorted(outputs.values()) == ["cancelled: it may have been done in part", "paid"]


async def test_an_agent_that_does_not_listen_is_ended_and_begun_anew(tmp_path):
    async with world(cancel_s=0.3, term_s=0.3) as w:
        s = await started(w, tmp_path)
        await w.say(s, "hello", turn=1)
        machine = (await w.log.get(s)).meta["machine"]
        await w.sessions.send(s, "deaf", key="2")
        await appears(tmp_path / "deaf")
        await w.sessions.cancel(s)
        await w.until(s, "turn.end", count=2)
        log = await w.say(s, "hello again", turn=3)
        assert [e.body["cause"] for e in log if e.kind == "turn.cut"] == ["cancel"]
        assert ends(log) == ["done", "cancelled", "done"]
        assert life(log) == [(1, False), (1, False)]  # a new process
        assert (await w.log.get(s)).meta["machine"] == machine  # in the same machine
        assert ("kill", machine) not in w.machines.calls


async def test_a_once_call_that_does_not_end_is_a_doubt(tmp_path):
    async with world(cancel_s=0.3, term_s=0.3) as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "pay a", key="1")
        await appears(tmp_path / "pay")
        await w.sessions.cancel(s)
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("tool.doubt") == 1
        assert (tmp_path / "pay").read_text() == "x\n"


async def test_a_stop_before_the_machine_is_up_cancels_the_turn_that_begins(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.abandon()
        await w.sessions.send(s, "wait a", key="1")
        await w.sessions.cancel(s)
        await w.sessions.send(s, "hello", key="2")
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert ends(log) == ["cancelled", "done"]
        assert not (tmp_path / "wait-a").exists()
        assert texts(log) == ["answer to wait a + hello"]


async def test_a_cancel_survives_the_server(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "wait a", key="1")
        await appears(tmp_path / "wait-a")
        await w.sessions.abandon()
        await w.machines.drop_streams()
        await w.sessions.cancel(s)
        w.new_server()
        await w.sessions.recover()
        end = await w.until(s, "turn.end")
        assert end.body["status"] == "cancelled"


async def test_nothing_to_cancel_is_said(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        with pytest.raises(IllegalState, match="no turn to cancel"):
            await w.sessions.cancel(s)
        await w.say(s, "hello", turn=1)
        with pytest.raises(IllegalState):
            await w.sessions.cancel(s, turn=1)
        await w.say(s, "hello", turn=2)
        assert ends(await w.entries(s)) == ["done", "done"]


async def test_messages_queue_in_order(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "wait a", key="1")
        await appears(tmp_path / "wait-a")
        for n in ("two", "three"):
            await w.sessions.send(s, n, key=n)
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end", count=3)
        log = await w.entries(s)
        assert texts(log)[1:] == ["answer to wait a", "answer to wait a + two", "answer to wait a + two + three"]


async def test_a_steering_message_is_seen_at_the_next_model_call(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "wait a", key="1")
        await appears(tmp_path / "wait-a")
        await w.sessions.send(s, "and be brief", key="2", mode="steer")
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end")
        log = await w.say(s, "next", turn=2)
        assert texts(log)[1] == "answer to wait a + and be brief"
        assert ends(log) == ["done", "done"]  # it had no turn of its own


async def test_a_steering_message_that_came_too_late_gets_its_own_turn(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "talk", key="1")
        await appears(tmp_path / "talking")
        await w.sessions.send(s, "late words", key="2", mode="steer")
        (tmp_path / "go-talk").touch()
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert texts(log) == ["let me think about it", "answer to talk + late words"]
        assert [m["text"] for m in messages(log)] == ["talk", "let me think about it", "late words", texts(log)[1]]


async def test_a_steering_message_to_a_session_at_rest_is_a_message(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "hello", key="1", mode="steer")
        await w.until(s, "turn.end")
        assert texts(await w.entries(s)) == ["answer to hello"]


async def test_an_interrupting_message_stops_the_turn_and_is_answered_in_its_order(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "wait a", key="1")
        await appears(tmp_path / "wait-a")
        await w.sessions.send(s, "no, this", key="2", mode="interrupt")
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert ends(log) == ["cancelled", "done"]
        assert texts(log)[-1] == "answer to wait a + no, this"
        assert life(log) == [(1, True), (2, False)]


async def test_modes_are_checked(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        with pytest.raises(BadInput, match="queue, steer, interrupt"):
            await w.sessions.send(s, "x", mode="shout")


async def test_streams_cut_while_cancelling_lose_nothing(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "wait a", key="1")
        await appears(tmp_path / "wait-a")
        cancelling = asyncio.create_task(w.sessions.cancel(s))
        for _ in range(5):
            await w.machines.drop_streams()
            await asyncio.sleep(0.02)
        await cancelling
        assert (await w.until(s, "turn.end")).body["status"] == "cancelled"
        assert life(await w.say(s, "hello", turn=2)) == [(1, True), (2, False)]
