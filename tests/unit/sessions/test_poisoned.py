"""Agent code that cannot even be loaded, or dies at once: a bounded number of attempts, a clear end, and a human who mends it."""

import pytest

from recess.testing.session_world import texts, world

GOOD = """
from recess_agent import agent

@agent(idle="1h")
async def me(s):
    async for turn in s:
        await s.say("heard " + turn.text)
"""
POISON = {
    "raises at import": "raise ValueError('no good')\n" + GOOD,
    "dies at import": "import os\nos._exit(9)\n" + GOOD,
    "defines no agent": "import asyncio\n",
    "dies before its first turn": GOOD.replace("    async for", "    raise ValueError('no good')\n    async for"),
}


@pytest.mark.parametrize("source", POISON.values(), ids=POISON)
async def test_poisoned_code_fails_its_turn_and_can_be_mended(source):
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": source})
        s = (await w.sessions.start("me")).id
        await w.sessions.send(s, "one")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert end.body["status"] == "failed"
        assert end.body["error"]  # what a human needs to see
        starts = [e.body["attempt"] for e in await w.entries(s, "turn.start")]
        assert starts == list(range(1, len(starts) + 1))
        assert len(starts) <= 3
        await w.sessions.deploy("me", {"agent.py": GOOD})
        await w.sessions.send(s, "two")
        end = await w.until(s, "turn.end", count=2, timeout_s=60)
        assert (end.body["status"], texts(await w.entries(s))[-1]) == ("done", "heard two")


async def test_a_version_that_is_poisoned_is_rolled_back_and_loses_nothing():
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": GOOD})
        s = (await w.sessions.start("me")).id
        assert texts(await w.say(s, "one", turn=1))[-1] == "heard one"
        await w.sessions.deploy("me", {"agent.py": POISON["raises at import"]})
        await w.sessions.send(s, "two")
        end = await w.until(s, "turn.end", count=2, timeout_s=60)
        assert end.body["status"] == "failed"
        assert "no good" in end.body["error"]
        await w.sessions.deploy("me", {"agent.py": GOOD})
        assert texts(await w.say(s, "three", turn=3)) == ["heard one", "heard three"]
