"""Waiting in the middle of a turn holds no machine: questions, times, approvals, child sessions."""

import asyncio

import pytest

from recess.contextlog.transcript import check_transcript, messages
from recess.errors import BadInput, KeyReused, NotFound
from recess.testing.session_agents import MARKS
from recess.testing.session_world import appears, kinds, texts, world

AGENT = (
    MARKS
    + """
import asyncio
from recess_agent import ModelError, agent, tool

def costly(arguments):
    return arguments["cents"] > 100

@tool(effect="keyed", approve=costly, approve_timeout=3600)
async def charge(cents: int, *, call) -> str:
    mark("charges", str(cents))
    return "charged " + str(cents)

@tool
async def ask_user(text: str) -> str:
    return "the user says " + str(await SESSION[0].ask(text))

SESSION = []

async def slow_model(name):
    mark("model-" + name)
    while not (SHARED / ("go-" + name)).exists():
        await asyncio.sleep(0.01)
    return {"text": "thought"}

def said(text):
    async def reply():
        yield text
    return reply()

async def calls(cents):
    return {"text": "paying", "tool_calls": [{"id": "c1", "name": "charge", "arguments": {"cents": cents}}]}

async def asks(text):
    return {"text": "", "tool_calls": [{"id": "a1", "name": "ask_user", "arguments": {"text": text}}]}

async def overloaded():
    mark("tries")
    if not (SHARED / "model-up").exists():
        error = ModelError("overloaded", 503, retry_after=900)
        raise error
    return {"text": "at last"}

@agent(image="base", idle="30s", tools=[charge, ask_user])
async def me(s):
    SESSION[:] = [s]
    nonce = os.urandom(4).hex()
    async for turn in s:
        word, _, rest = turn.text.partition(" ")
        mark("began", turn.text)
        if word == "ask":
            answer = await s.ask("red or blue?", ["red", "blue"], show=rest == "show")
            await s.say("you said " + str(answer))
        elif word == "quick":
            await s.say("got " + str(await s.ask("anyone?", timeout=120)))
        elif word == "sleep":
            await s.sleep(float(rest))
            await s.say("slept")
        elif word == "retry":
            while True:
                try:
                    reply = await s.stream(overloaded())
                    break
                except ModelError as error:
                    await s.retry_after(error)
        elif word == "pay":
            reply = await s.stream(calls(int(rest)))
            await s.say(" ".join(await s.run_tools(reply)))
        elif word == "tool":
            reply = await s.stream(asks(rest))
            await s.say(" ".join(await s.run_tools(reply)))
        elif word == "beside":
            reply, answer = await asyncio.gather(s.stream(slow_model("b")), s.ask("well?"))
            await s.say(reply.text + " and " + answer)
        elif word == "impatient":
            try:
                await asyncio.wait_for(s.ask("well?"), 0.02)  # well before the machine rests
            except asyncio.TimeoutError:
                while not (SHARED / "go-on").exists():
                    await asyncio.sleep(0.01)
                await s.say("went on")
        elif word == "named":
            await s.say("so " + await s.ask("which?", ref="mine"))
        elif word == "team":
            reports = await asyncio.gather(s.spawn("worker", "part a"), s.spawn("worker", "part b"))
            await s.say(" and ".join(r.text + " " + r.status for r in reports))
        elif word == "compact":
            await s.compact("we talked of " + rest)
            await s.say(" | ".join(m["content"] for m in s.messages()))
        else:
            await s.say("hello")
        await s.note(nonce=nonce)
"""
)

BUSY_HOOK = """
@me.on_suspend
async def suspended(info):
    if not (SHARED / "model-h").exists():
        asyncio.ensure_future(SESSION[0].stream(slow_model("h")))
        while not (SHARED / "model-h").exists():
            await asyncio.sleep(0.01)
"""

WORKER = """
from recess_agent import agent

@agent(image="base", idle="100ms")
async def worker(s):
    async for turn in s:
        await s.say("done with " + turn.text)
"""


async def started(w, shared):
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(shared)}})
    return (await w.sessions.start("me")).id


def same_process(log):
    return len({e.body["nonce"] for e in log if e.kind == "note"}) == 1


async def frozen_asking(w, s, text):
    """Send, wait until the session is put away with an open question, return the question."""
    await w.sessions.send(s, text)
    await w.until(s, "ask")
    await w.until_state(s, "frozen")
    (question,) = await w.sessions.questions(s)
    return question


async def test_a_question_holds_no_machine_and_the_same_coroutine_gets_the_answer(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "ask")
        row = await w.log.get(s)
        assert (await w.machines.get(row.meta["machine"])).state == "suspended"
        assert not w.sessions.is_live(s)
        assert (question.text, question.choices) == ("red or blue?", ("red", "blue"))
        await w.sessions.answer(s, question.ref, "blue")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert texts(log) == ["you said blue"]
        assert (tmp_path / "began").read_text() == "ask\n"  # nothing was run again
        assert [e.body["attempt"] for e in log if e.kind == "turn.start"] == [1]
        assert "turn.cut" not in kinds(log)
        assert [e.body["agent_kept"] for e in log if e.kind == "machine.restore"] == [False, True]
        assert [m["text"] for m in messages(log)] == [
            "ask",
            "you said blue",
        ]  # the answer is the code's, not the model's


async def test_answers_are_checked_and_the_first_one_stands(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "ask show")
        with pytest.raises(BadInput, match="red, blue"):
            await w.sessions.answer(s, question.ref, "green")
        with pytest.raises(NotFound, match="no answer to"):
            await w.sessions.answer(s, "ask-of-mine", "red")
        first = await w.sessions.answer(s, question.ref, "red")
        assert (await w.sessions.answer(s, question.ref, "red")).position == first.position
        with pytest.raises(KeyReused, match="answered before"):
            await w.sessions.answer(s, question.ref, "blue")
        await w.until(s, "turn.end")
        assert await w.sessions.questions(s) == []
        with pytest.raises(NotFound):
            await w.sessions.answer(s, question.ref, "red")
        assert [m["text"] for m in messages(await w.entries(s))] == ["ask show", "red", "you said red"]


async def test_a_name_of_ones_own_may_be_used_again_in_another_turn(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        for turn in (1, 2):
            await w.sessions.send(s, "named")
            await w.until(s, "ask", count=turn)
            await w.sessions.answer(s, "mine", "this")
            await w.until(s, "turn.end", count=turn)
        assert texts(await w.entries(s)) == ["so this", "so this"]


async def test_a_message_that_comes_while_a_question_is_open_waits_its_turn(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "ask")
        for n in (2, 3):
            await w.sessions.send(s, "hello", key=f"m{n}")
            await w.sessions.settled(s)
        row = await w.log.get(s)
        assert (row.state, row.owner) == ("frozen", "")
        assert row.meta["queued"] == [e.position for e in await w.entries(s, "user")][1:]
        assert kinds(await w.entries(s)).count("machine.restore") == 1  # no machine was brought up for them
        await w.crash_server()
        assert await w.sessions.recover() == []
        await w.sessions.answer(s, question.ref, "red")
        await w.until(s, "turn.end", count=3)
        log = await w.entries(s)
        assert texts(log) == ["you said red", "hello", "hello"]
        assert same_process(log)
        assert "queued" not in (await w.log.get(s)).meta


async def test_a_session_that_only_waits_is_brought_up_when_that_is_asked_for(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "ask")
        await w.sessions.send(s, "hello", key="m2")
        assert (await w.sessions.resume(s)).state == "running"
        await w.until_state(s, "frozen")
        await w.sessions.answer(s, question.ref, "red")
        await w.until(s, "turn.end", count=2)
        assert texts(await w.entries(s)) == ["you said red", "hello"]


@pytest.mark.parametrize("mode", ["steer", "interrupt"])
async def test_a_message_into_a_turn_that_waits_reaches_it(tmp_path, mode):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "ask")
        await w.sessions.send(s, "hello", key="m2", mode=mode)
        await w.until(s, "machine.restore", count=2)
        if mode == "steer":
            await w.sessions.answer(s, question.ref, "red")
        await w.until(s, "turn.end", count=2)
        statuses = [e.body["status"] for e in await w.entries(s, "turn.end")]
        assert statuses == (["done", "done"] if mode == "steer" else ["cancelled", "done"])


async def test_a_question_times_out_by_the_hosts_clock(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await frozen_asking(w, s, "quick")
        w.clock.jump(121)
        await w.until(s, "turn.end")
        assert texts(await w.entries(s)) == ["got None"]


async def test_an_answer_in_time_is_not_lost_to_a_late_machine(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "quick")
        await w.sessions.abandon()
        await w.sessions.answer(s, question.ref, "me")
        w.clock.jump(500)
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        assert texts(await w.entries(s)) == ["got me"]


async def test_a_long_sleep_is_slept_frozen(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "sleep 900")
        await w.until(s, "timer")
        await w.until_state(s, "frozen")
        w.clock.jump(890)
        await asyncio.sleep(0.2)  # it is the absence of a wake that is tested
        assert (await w.log.get(s)).state == "frozen"
        w.clock.jump(11)
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert texts(log) == ["slept"]
        assert (tmp_path / "began").read_text() == "sleep 900\n"


async def test_a_timer_survives_the_server(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "sleep 900")
        await w.until(s, "timer")
        await w.until_state(s, "frozen")
        await w.crash_server()
        assert await w.sessions.recover() == []
        w.clock.jump(901)
        await w.until(s, "turn.end")
        assert same_process(await w.entries(s))


async def test_a_time_that_passed_while_no_server_ran_wakes_at_start(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "sleep 900")
        await w.until(s, "timer")
        await w.until_state(s, "frozen")
        await w.sessions.abandon()
        w.clock.jump(5000)
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")


async def test_a_short_sleep_keeps_the_machine(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.say(s, "sleep 0.6", turn=1)
        log = await w.entries(s)
        assert "machine.snapshot" not in kinds(log)
        assert texts(log) == ["slept"]


async def test_a_sleep_in_a_turn_begun_anew_is_not_longer(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "sleep 900")
        await w.until(s, "timer")
        await w.until_state(s, "frozen")
        await w.machines.kill((await w.log.get(s)).meta["machine"], why="its node is gone")
        w.clock.jump(600)
        await w.sessions.resume(s)
        await w.until(s, "turn.start", count=2)
        await w.until_state(s, "frozen")
        w.clock.jump(301)
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("timer") == 1
        assert (tmp_path / "began").read_text() == "sleep 900\n" * 2


async def test_a_question_in_a_turn_begun_anew_is_not_asked_twice(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "ask")
        await w.machines.kill((await w.log.get(s)).meta["machine"], why="its node is gone")
        await w.sessions.answer(s, question.ref, "red")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("ask") == 1
        assert texts(log) == ["you said red"]


async def test_a_model_that_is_down_for_15_minutes(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "retry")
        await w.until(s, "timer")
        await w.until_state(s, "frozen")
        (tmp_path / "model-up").touch()
        w.clock.jump(901)
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert texts(log) == ["at last"]
        assert (tmp_path / "tries").read_text() == "x\n" * 2  # only that call was made again
        assert (tmp_path / "began").read_text() == "retry\n"


async def test_a_call_is_approved_denied_or_forgotten(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.say(s, "pay 50", turn=1)  # under the limit: nobody is asked
        question = await frozen_asking(w, s, "pay 500")
        assert question.body["approval"] == {"call": "c1~2", "name": "charge", "arguments": {"cents": 500}}
        assert "tool.start" not in [e.kind for e in await w.entries(s) if e.turn == 2]
        await w.sessions.answer(s, question.ref, "approve")
        await w.until(s, "turn.end", count=2)
        await w.sessions.send(s, "pay 600")
        await w.until(s, "ask", count=2)
        (question,) = await w.sessions.questions(s)
        await w.sessions.answer(s, question.ref, "deny")
        await w.until(s, "turn.end", count=3)
        await w.sessions.send(s, "pay 700")
        await w.until(s, "ask", count=3)
        await w.until_state(s, "frozen")
        w.clock.jump(3601)
        await w.until(s, "turn.end", count=4)
        log = await w.entries(s)
        assert texts(log)[1::2] == [
            "charged 50", "charged 500", "not run: a human denied it", "not run: nobody approved it in time",
        ]  # fmt: skip
        assert (tmp_path / "charges").read_text() == "50\n500\n"
        assert check_transcript(messages(log)) == []


async def test_a_tool_that_asks_holds_no_machine(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        question = await frozen_asking(w, s, "tool tea or coffee?")
        assert kinds(await w.entries(s)).count("tool.start") == 1
        await w.sessions.answer(s, question.ref, "tea")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert texts(log)[-1] == "the user says tea"
        assert same_process(log)
        assert "turn.cut" not in kinds(log)


async def still_running(w, s):
    await asyncio.sleep(
        0.8
    )  # four times as long as a resting machine stays up: it is the absence of a freeze that is tested
    return (await w.log.get(s)).state == "running"


async def test_a_model_call_beside_a_question_is_no_rest(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "beside")
        await w.until(s, "ask")
        await appears(tmp_path / "model-b")
        assert await still_running(w, s)
        await w.machines.drop_streams()
        assert await still_running(w, s)  # a new stream knows it too
        (tmp_path / "go-b").touch()
        await w.until_state(s, "frozen")
        (question,) = await w.sessions.questions(s)
        await w.sessions.answer(s, question.ref, "yes")
        await w.until(s, "turn.end")
        assert texts(await w.entries(s)) == ["thought", "thought and yes"]


async def test_work_that_begins_while_it_is_being_put_away_is_not_frozen_over(tmp_path):
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": AGENT + BUSY_HOOK}, {"env": {"SHARED": str(tmp_path)}})
        s = (await w.sessions.start("me")).id
        await w.sessions.send(s, "ask")
        await appears(tmp_path / "model-h")
        assert await still_running(w, s)
        assert "machine.snapshot" not in kinds(await w.entries(s))
        (tmp_path / "go-h").touch()
        await w.until_state(s, "frozen")
        (question,) = await w.sessions.questions(s)
        await w.sessions.answer(s, question.ref, "red")
        await w.until(s, "turn.end")
        assert same_process(await w.entries(s))


async def test_a_wait_that_was_given_up_is_no_rest(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.send(s, "impatient")
        await w.until(s, "ask")
        assert await still_running(w, s)
        (tmp_path / "go-on").touch()
        await w.until(s, "turn.end")


async def test_children_work_while_the_parent_sleeps(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.deploy("worker", {"agent.py": WORKER})
        await w.sessions.send(s, "team")
        await w.until(s, "turn.end", timeout_s=40)
        log = await w.entries(s)
        assert texts(log) == ["done with part a done and done with part b done"]
        children = [e.body["child"] for e in log if e.kind == "x.spawn"]
        assert len(set(children)) == 2
        for child in children:
            row = await w.log.get(child)
            assert row.labels["spawned-by"] == s
            assert "report" not in row.meta
        assert [m["text"] for m in messages(log)] == ["team", texts(log)[0]]


async def test_a_parent_whose_server_died_hears_of_its_children(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.sessions.deploy("worker", {"agent.py": WORKER})
        await w.sessions.send(s, "team")
        await w.until(s, "x.spawn", count=2)
        await w.crash_server()
        await w.sessions.recover()
        await w.until(s, "turn.end", timeout_s=40)
        log = await w.entries(s)
        assert texts(log) == ["done with part a done and done with part b done"]
        assert kinds(log).count("answer") == 2


async def test_a_question_is_cancelled(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await frozen_asking(w, s, "ask")
        await w.sessions.cancel(s)
        end = await w.until(s, "turn.end")
        assert end.body["status"] == "cancelled"
        log = await w.say(s, "hello", turn=2)
        assert texts(log) == ["hello"]
        assert await w.sessions.questions(s) == []


async def test_a_message_in_the_window_of_a_resting_freeze_is_not_lost(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        original, sent = w.machines.snapshot, []

        async def snapshot(ref, **kwargs):
            taken = await original(ref, **kwargs)
            if not sent:
                (question,) = await w.sessions.questions(s)
                sent.append(await w.sessions.answer(s, question.ref, "red"))
            return taken

        w.machines.snapshot = snapshot
        await w.sessions.send(s, "ask")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert texts(log) == ["you said red"]
        assert kinds(log).count("machine.restore") == 1  # the freeze was cancelled


async def test_compaction_keeps_the_turn_at_work(tmp_path):
    async with world() as w:
        s = await started(w, tmp_path)
        await w.say(s, "hello", turn=1)
        log = await w.say(s, "compact greetings", turn=2)
        shown = texts(log)[-1]
        assert shown.startswith("[recess] Summary of the conversation before this point:\nwe talked of greetings")
        assert shown.endswith("compact greetings")
        assert [m["content"] if "content" in m else m["text"] for m in messages(log)][1] == "compact greetings"
        assert len(log) > 8  # nothing was deleted


async def test_a_wait_for_what_nobody_asked_is_refused(tmp_path):
    async with world() as w:
        source = AGENT.replace('await s.say("hello")', 'await s.say(repr(await stray(s)))').replace(
            "@agent(",
            "async def stray(s):\n    try:\n        await s._wire.request('wait', refs=['nothing'], turn=s.turn.number)\n"
            "    except Exception as exc:\n        return exc.code\n\n@agent(",
        )  # fmt: skip
        await w.sessions.deploy("me", {"agent.py": source}, {"env": {"SHARED": str(tmp_path)}})
        s = (await w.sessions.start("me")).id
        assert texts(await w.say(s, "hi", turn=1)) == ["'not_found'"]
        assert await appears(tmp_path / "began") is None
