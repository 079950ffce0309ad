"""The offline harness: what an author's test may rely on, and that nothing of it is left in the process."""

import os
import sys
import time
from pathlib import Path

import pytest

from recess.testing.offline import Refuse, ScriptedModel, call, calls, offline

AGENT = """
import asyncio, os
from pathlib import Path
from recess_agent import agent, openai_chat, tool
import helper

SEEN = []

@tool
def put(name: str) -> str:
    Path(name).write_text("x")
    return helper.WORD + " " + name

@tool(effect="once")
async def wire(cents: int) -> str:
    SEEN.append(cents)
    await asyncio.sleep(3600)

@tool(approve=True)
def risky() -> str:
    return "done"

@agent(idle="1h", tools=[put, wire, risky])
async def me(s):
    async for turn in s:
        if turn.text == "wait":
            await s.sleep(900)
        if turn.text == "fail":
            raise ValueError("as it was told")
        while True:
            reply = await s.stream(openai_chat(s.messages(), s.tools))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        await s.note(seen=list(SEEN), word=helper.WORD, env=os.environ.get("GIVEN", ""))

@me.on_suspend
def suspended(info):
    SEEN.append("suspend")
"""
FILES = {"agent.py": AGENT, "helper.py": "WORD = 'put'"}


async def test_a_turn_with_tools_is_fast_and_leaves_nothing_behind():
    before = (Path.cwd(), dict(os.environ), list(sys.path), "helper" in sys.modules)
    model = ScriptedModel(calls(call("put", name="a"), call("put", name="b"), text="so"), "Both.")
    async with offline(FILES, model, env={"GIVEN": "1"}) as run:
        began = time.process_time()
        turn = await run.say("put them")
        spent = time.process_time() - began
        assert (turn.status, turn.text, turn.attempts) == ("done", "Both.", 1)
        assert [(one.name, one.output, one.outcome) for one in turn.calls] == [
            ("put", "put a", "result"),
            ("put", "put b", "result"),
        ]
        folder = await run.folder()
        assert sorted(one.name for one in folder.iterdir()) == ["a", "b"]
        assert (await run.log("note"))[0].body["env"] == "1"
        assert [one["role"] for one in await run.transcript()] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (Path.cwd(), dict(os.environ), list(sys.path), "helper" in sys.modules) == before
    assert not folder.exists()
    assert spent < 5, "of processor time: machines take longer to start"


async def test_time_passes_when_it_is_told_to():
    async with offline(FILES, ScriptedModel("Good morning.")) as run:
        position = await run.send("wait")
        await run.seen("timer")
        await run.freeze()
        assert (await run.world.log.get(run.session)).state == "frozen"
        await run.pass_time(901)
        turn = await run.turn(position)
        assert (turn.text, turn.attempts) == ("Good morning.", 1)
        assert (await run.log("note"))[0].body["seen"] == ["suspend"], "its hook ran, and its memory is the same"


async def test_a_dead_agent_leaves_a_doubt_and_no_second_call():
    model = ScriptedModel(call("wire", cents=5), "I do not know.")
    async with offline(FILES, model) as run:
        position = await run.send("wire 5")
        await run.seen("tool.start")
        await run.kill_agent()
        turn = await run.turn(position)
        assert (turn.attempts, turn.calls[0].outcome, turn.text) == (2, "doubt", "I do not know.")
        assert (await run.log("note"))[0].body["seen"] == [], "the new process has memory of its own"
        assert len(model.requests) == 2


async def test_a_restarted_server_takes_the_agent_over():
    async with offline(FILES, ScriptedModel("One.", "Two.")) as run:
        await run.say("first")
        await run.restart_server()
        assert (await run.say("second")).text == "Two."
        assert [one.body["rung"] for one in await run.log("machine.restore")] == [5, 1]


async def test_people_and_upgrades():
    async with offline(FILES, ScriptedModel(call("risky"), "Approved.", "New.")) as run:
        position = await run.send("go")
        assert "risky" in (await run.question()).text
        await run.answer("approve")
        assert (await run.turn(position)).calls[0].output == "done"
        await run.deploy({**FILES, "helper.py": "WORD = 'newer'"})
        assert (await run.say("again")).text == "New."
        assert [one.body["word"] for one in await run.log("note")] == ["put", "newer"], "its modules are loaded afresh"


async def test_a_script_that_ends_and_an_agent_that_raises_fail_the_turn_and_say_so():
    async with offline(FILES, ScriptedModel("One.")) as run:
        await run.say("first")
        turn = await run.say("second")
        assert turn.status == "failed"
        assert "the script has 1 replies" in turn.error
        turn = await run.say("fail")
        assert "as it was told" in turn.error


async def test_a_refusal_is_said_once_and_a_step_may_be_a_function():
    model = ScriptedModel(Refuse(429, retry_after=0), lambda messages: f"You said {messages[-1]['content']}")
    async with offline(FILES, model) as run:
        assert (await run.say("hi")).text == "You said hi"


async def test_a_folder_brings_the_files_beside_the_agent(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "test_agent.py").write_text("raise SystemExit")
    async with offline(tmp_path / "agent.py", ScriptedModel("Hello.")) as run:
        assert (await run.say("hi")).text == "Hello."
    with pytest.raises(FileNotFoundError):
        async with offline(tmp_path / "none.py"):
            pass
