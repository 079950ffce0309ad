"""What is left of calls side by side when one of them fails, and of a child with more to say than an inbox takes."""

import json

from recess.contextlog.contract import INBOX_BYTES_MAX
from recess.sessions.children import REPORT_TEXT_BYTES, _last_words
from recess.testing.session_world import texts, world

SIDE_BY_SIDE = """
import asyncio
from recess_agent import Reply, ToolCall, agent, tool

begun, ended = asyncio.Event(), []

@tool
async def slow() -> str:
    begun.set()
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        ended.append("slow")
        raise
    return "never"

@tool(approve=lambda arguments: False)
async def refused() -> str:
    return "never"

@agent(idle="30s", tools=[slow, refused])
async def me(s):
    async for turn in s:
        reply = await s.stream(asked(turn.text))
        running = asyncio.ensure_future(s.run_tools(reply, parallel=True))
        try:
            if turn.text == "cancelled":
                await begun.wait()
                running.cancel()
            await running
        except BaseException as error:
            await s.say(f"{type(error).__name__} {ended} {len(asyncio.all_tasks()) < 10}")
        begun.clear()
        ended.clear()

async def asked(text):
    calls = [ToolCall("a" + text, "slow", {})]
    if text == "refused":  # longer than a call's name in the log may be: the log refuses it
        calls.append(ToolCall("b" * 200, "refused", {}))
    return Reply("", calls)
"""

CHATTY = """
from recess_agent import agent

@agent(idle="30s")
async def me(s):
    async for turn in s:
        if turn.text == "child":
            await s.say("ä" * 3_600_000)
        else:
            report = await s.spawn("me", "child")
            await s.say(f"{report.status} {len(report.text)} {report.text[-60:]}")
"""


async def test_a_call_that_fails_leaves_no_sibling_at_work() -> None:
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": SIDE_BY_SIDE})
        s = (await w.sessions.start("me")).id
        assert texts(await w.say(s, "refused", turn=1))[-1] == "SessionError ['slow'] True"
        assert texts(await w.say(s, "cancelled", turn=2))[-1] == "CancelledError ['slow'] True"


async def test_a_child_that_says_too_much_is_heard_in_part() -> None:
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": CHATTY})
        s = (await w.sessions.start("me")).id
        said = texts(await w.say(s, "go", turn=1))[-1]
        assert said.startswith("done ")
        assert "more bytes are in the log of this session's child" in said


def test_a_report_always_fits_an_inbox() -> None:
    class Said:
        turn, kind = 1, "assistant"
        body = {"text": "\x01" * (8 << 20)}  # noqa: RUF012

    class Ended(Said):
        kind = "turn.end"
        body = {"status": "failed", "error": "x" * 4000}  # noqa: RUF012

    told = _last_words([Said(), Ended()], 1)
    assert len(json.dumps(told)) < INBOX_BYTES_MAX
    assert len(told["text"]) > REPORT_TEXT_BYTES
    assert (told["status"], told["error"]) == ("failed", "x" * 4000)
