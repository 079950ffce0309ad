"""Newer code with another image, in a real machine: it boots the other root with the disk it had, and says that memory is gone."""

from __future__ import annotations

import asyncio

import pytest

from recess.config import Config
from recess.contextlog.transcript import messages
from recess.node.local import LocalNode
from recess.testing.second_image import with_second_image
from recess.testing.session_world import notes

AGENT = """
import os, pathlib
from recess_agent import agent

async def model():
    yield "ok"

@agent(image="IMAGE", idle="60s")
async def coder(s):
    nonce = os.urandom(8).hex()
    async for turn in s:
        await s.stream(model())
        home = pathlib.Path("/root/repo")
        if not home.exists():
            home.write_text(nonce)
        release = pathlib.Path("/etc/os-release").read_text()
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        await s.note(nonce=nonce, kept=home.read_text(), second="(bookwurm)" in release, boot=boot)
"""


@pytest.mark.timeout(900)
async def test_another_image_boots_with_the_same_disk(real_config: Config) -> None:
    with_second_image(real_config)
    node = await LocalNode.open(real_config)
    try:
        await node.sessions.deploy("coder", {"agent.py": AGENT.replace("IMAGE", "base")})
        session = (await node.sessions.start("coder")).id

        async def say(text: str, turn: int) -> dict[str, object]:
            position = (await node.sessions.send(session, text)).position
            async with asyncio.timeout(400):
                async for item in node.sessions.follow(session, after=position):
                    if getattr(item, "kind", "") == "turn.end" and item.turn == turn:
                        assert item.body["status"] == "done"
                        return notes(await node.sessions.read(session))[-1]
            raise AssertionError("the session was closed")

        one = await say("one", 1)
        assert (one["second"], one["kept"]) == (False, one["nonce"])
        machine = str((await node.sessions.get(session)).meta["machine"])
        await node.sessions.deploy("coder", {"agent.py": AGENT.replace("IMAGE", "second")})
        two = await say("two", 2)
        assert two["second"] is True, "it runs on the other root"
        assert two["kept"] == one["nonce"], "its disk is the same"
        assert two["boot"] != one["boot"]
        assert two["nonce"] != one["nonce"], "its memory is not"
        assert (await node.machines.get(machine)).spec.image == "second"
        log = await node.sessions.read(session)
        back = [e.body for e in log if e.kind == "machine.restore"][-1]
        assert (back["rung"], back["lost"]) == (4, "processes and memory of before; no file")
        told = [m["text"] for m in messages(log) if m.get("note")]
        assert any("second" in text and "files are kept" in text for text in told), told
    finally:
        for row in await node.sessions.list_sessions():
            await node.sessions.close(row.id)
        await node.close(detach=False)
