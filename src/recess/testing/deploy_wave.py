"""Many sessions in the middle of a turn while newer code is deployed, and an account of what must hold for each of them.

Used by the tests (agents as tasks of this process) and by `make soak` (agents as processes). It must know nothing of pytest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from recess.contextlog.transcript import check_transcript, messages
from recess.testing.session_world import World

STEPS = 3
WAVE_S = 300.0

AGENT = """
import asyncio, os, pathlib
from recess_agent import agent, tool

SHARED = pathlib.Path(os.environ["SHARED"])
VERSION = "VERSION_HERE"

@tool(effect="keyed")
async def step(n: int, *, call) -> str:
    with open(SHARED / "steps", "a") as file:
        file.write(call.key + "\\n")
    while n == 1 and not (SHARED / "go").exists():
        await asyncio.sleep(0.05)
    return "step " + str(n)

async def model(messages):
    own = [m["role"] == "user" and not m["content"].startswith("[recess]") for m in messages]
    since = messages[max(i for i, mine in enumerate(own) if mine):]
    done = sum(m["role"] == "tool" for m in since)
    if done < STEPS_HERE:
        yield {"text": "", "tool_calls": [{"id": "c", "name": "step", "arguments": {"n": done}}]}
    else:
        yield VERSION + " ends what began with " + str(sum(own)) + " messages"

@agent(image="base", idle="1h", tools=[step])
async def wave(s):
    async for turn in s:
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
"""


async def deploy_wave(w: World, count: int, policy: str, shared: Path) -> Counter[str]:
    """Begin a turn in `count` sessions, deploy a newer version by `policy` (turn | now) in the middle of all of them, let them
    end, and give each one more message. Returns how many ended under which version. Raises AssertionError."""
    await _deploy(w, "one", policy, shared)
    sessions = [(await w.sessions.start("wave")).id for _ in range(count)]
    for session in sessions:
        await w.sessions.send(session, "first")
    await asyncio.gather(*(w.until(one, "tool.start", count=2, timeout_s=WAVE_S) for one in sessions))
    await _deploy(w, "two", policy, shared)
    if policy == "now":
        await asyncio.gather(*(w.until(one, "code", timeout_s=WAVE_S) for one in sessions))
    (shared / "go").touch()
    await asyncio.gather(*(w.until(one, "turn.end", timeout_s=WAVE_S) for one in sessions))
    for session in sessions:
        await w.sessions.send(session, "second")
    await asyncio.gather(*(w.until(one, "turn.end", count=2, timeout_s=WAVE_S) for one in sessions))
    ended: Counter[str] = Counter()
    for session in sessions:
        ended[await _account(w, session, policy)] += 1
    keys = Counter((shared / "steps").read_text().split())
    assert len(keys) == 2 * STEPS * count, "each call has one key, whatever process ran it"
    again = sum(runs - 1 for runs in keys.values())
    assert again <= (count if policy == "now" else 0), "a call that had ended is never run again"
    return ended


async def _deploy(w: World, version: str, policy: str, shared: Path) -> None:
    source = AGENT.replace("VERSION_HERE", version).replace("STEPS_HERE", str(STEPS))
    await w.sessions.deploy("wave", {"agent.py": source}, {"env": {"SHARED": str(shared)}, "policy": policy})


async def _account(w: World, session: str, policy: str) -> str:
    """Return the version under which the first turn ended."""
    log = await w.entries(session)
    wrong = check_transcript(messages(log))
    assert not wrong, wrong
    assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done", "done"], await w.describe(session)
    said = [str(e.body["text"]) for e in log if e.kind == "assistant" and e.body.get("text")]
    first = "one" if policy == "turn" else "two"
    wanted = [f"{first} ends what began with 1 messages", "two ends what began with 2 messages"]
    assert said == wanted, await w.describe(session)
    cuts = [e.body["cause"] for e in log if e.kind == "turn.cut"]
    assert cuts == ([] if policy == "turn" else ["upgrade"]), "nothing but the deploy cuts a turn"
    assert [e.body["new"] for e in log if e.kind == "code"] == [(await w.agents.current("wave")).version]
    return first
