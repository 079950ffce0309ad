"""A real kernel's OOM killer: the agent is ended by it, its machine boots its disk with twice the memory, and the turn goes on."""

from __future__ import annotations

import asyncio

import pytest

from recess.config import Config
from recess.contextlog.transcript import messages
from recess.node.local import LocalNode
from recess.testing.session_world import notes

AGENT = """
import pathlib
from recess_agent import agent, tool

def meminfo(name):
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

@tool
def write(name: str) -> str:
    with open("/root/journal", "a") as file:
        file.write(name)
    return "written"

async def model(messages):
    if any(m["role"] == "tool" for m in messages):
        yield "written, now the large part"
    else:
        yield {"tool_calls": [{"id": "c", "name": "write", "arguments": {"name": "x"}}]}

@agent(image="base", memory="256M", idle="60s", tools=[write])
async def hungry(s):
    async for turn in s:
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        total = meminfo("MemTotal")
        held = []
        while len(held) < 240:  # MiB, each page its own: more than the small machine has, less than the larger
            held.append(bytes([len(held) % 251 + 1]) * (1 << 20))
        await s.note(total=total, held=len(held), journal=pathlib.Path("/root/journal").read_text(), attempt=turn.attempt)
"""


@pytest.mark.timeout(300)
async def test_the_agent_is_ended_by_the_kernel_and_goes_on_with_more_memory(real_config: Config) -> None:
    node = await LocalNode.open(real_config)
    try:
        await node.sessions.deploy("hungry", {"agent.py": AGENT})
        session = (await node.sessions.start("hungry")).id
        await node.sessions.send(session, "go")
        async with asyncio.timeout(280):
            async for item in node.sessions.follow(session):
                if getattr(item, "kind", "") == "turn.end":
                    break
        log = await node.sessions.read(session)
        (cut,) = [e.body for e in log if e.kind == "turn.cut"]
        assert (cut["cause"], cut["memory_bytes"]) == ("oom", 256 << 20)
        assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done"]
        (said,) = notes(log)
        assert (said["attempt"], said["journal"]) == (2, "x"), "its disk is the same, the call was not run again"
        assert said["total"] > 400 << 20
        assert [e.body["rung"] for e in log if e.kind == "machine.restore"] == [5, 4]
        machine = await node.machines.get(str((await node.sessions.get(session)).meta["machine"]))
        assert machine.spec.memory_bytes == 512 << 20
        assert any("256 MiB" in m["text"] for m in messages(log) if m.get("note")), "the model is told"
    finally:
        for row in await node.sessions.list_sessions():
            await node.sessions.close(row.id)
        await node.close(detach=False)
