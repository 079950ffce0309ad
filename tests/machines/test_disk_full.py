"""A guest disk that is really full: the tool's error says so, the session is put away and comes back with it, and what is removed
can be used again; nothing of it ends the machine or the session."""

from __future__ import annotations

import asyncio

import pytest

from recess.config import Config
from recess.node.local import LocalNode
from recess.testing.session_world import notes

AGENT = """
import os, pathlib
from recess_agent import agent, tool

@tool
def fill(path: str) -> str:
    with open(path, "wb") as file:
        while True:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())

@tool
def keep(path: str) -> str:
    with open(path, "w") as file:
        file.write("x" * 100_000)
        file.flush()
        os.fsync(file.fileno())
    return "kept"

@tool
def drop(path: str) -> str:
    os.remove(path)
    return "dropped"

async def model(messages):
    last = messages[-1]
    if last["role"] == "tool":
        yield last["content"]
    else:
        name, path = [m["content"] for m in messages if m["role"] == "user" and "[recess]" not in m["content"]][-1].split()
        yield {"tool_calls": [{"id": "c", "name": name, "arguments": {"path": path}}]}

@agent(image="base", disk="DISK", idle="1s", tools=[fill, keep, drop])
async def writer(s):
    nonce = os.urandom(8).hex()
    async for turn in s:
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        size = pathlib.Path("/root/big").stat().st_size if pathlib.Path("/root/big").exists() else 0
        await s.note(nonce=nonce, said=reply.text, size=size)
"""


@pytest.mark.timeout(900)
async def test_the_tool_is_told_and_the_session_goes_on_when_there_is_room(real_config: Config) -> None:
    node = await LocalNode.open(real_config)
    try:
        await node.sessions.deploy("writer", {"agent.py": AGENT.replace("DISK", "64M")})
        session = (await node.sessions.start("writer")).id

        async def say(text: str, turn: int) -> dict[str, object]:
            position = (await node.sessions.send(session, text)).position
            async with asyncio.timeout(400):
                async for item in node.sessions.follow(session, after=position):
                    if getattr(item, "kind", "") == "turn.end" and item.turn == turn:
                        assert item.body["status"] == "done"
                        return notes(await node.sessions.read(session))[-1]
            raise AssertionError("the session was closed")

        full = await say("fill /root/big", 1)
        assert "the disk of this machine is full" in str(full["said"])
        assert 16 << 20 < int(str(full["size"])) < 64 << 20, "it took what there was, and no more"
        async with asyncio.timeout(400):
            while (row := await node.sessions.get(session)).state != "frozen":
                await node.log.wait(session, row.head, 0.2)
        again = await say("keep /root/small", 2)
        assert "the disk of this machine is full" in str(again["said"]), "put away and brought back as it was"
        assert "dropped" in str((await say("drop /root/big", 3))["said"])
        last = await say("keep /root/small", 4)
        assert last["said"] == "kept"
        assert last["nonce"] == full["nonce"], "the same process all the while"
    finally:
        for row in await node.sessions.list_sessions():
            await node.sessions.close(row.id)
        await node.close(detach=False)
