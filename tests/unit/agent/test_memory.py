"""Memories in the log: an attempt that was cut leaves nothing behind in them, a rewind takes back, a fork has its past."""

from pathlib import Path

from recess.testing.session_world import texts, world

AGENT = """
import os, pathlib
from recess_agent import agent
from recess_agent.memory_openai_agents import LogMemory
from recess_agent.memory_claude import LogStore
from recess_agent.records import Records

@agent(idle="30s")
async def me(s):
    async for turn in s:
        memory, store, records = LogMemory(s), LogStore(s), Records(s, "mine")
        await memory.add_items([{"role": "user", "content": turn.text}])
        await store.append({"project_key": "p", "session_id": "1"}, [{"uuid": turn.text, "type": "user"}])
        await records.add(text=turn.text)
        if turn.text == "die" and turn.attempt == 1:
            os._exit(9)
        items = ",".join(one["content"] for one in await memory.get_items())
        lines = ",".join(one["uuid"] for one in await store.load({"project_key": "p", "session_id": "1"}))
        await s.say(f"{items} {lines} {len(records.all())} {len(records.all(of_cut_attempts=False))}")
"""


async def test_what_a_memory_holds(tmp_path: Path) -> None:
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": AGENT})
        s = (await w.sessions.start("me")).id
        assert texts(await w.say(s, "one", turn=1))[-1] == "one one 1 1"
        assert texts(await w.say(s, "die", turn=2))[-1] == "one,die one,die 3 2"
        head = (await w.log.get(s)).head
        assert texts(await w.say(s, "three", turn=3))[-1] == "one,die,three one,die,three 4 3"
        await w.sessions.rewind(s, to=head)
        await w.sessions.send(s, "four")
        await w.until(s, "turn.end", count=4)
        assert texts(await w.entries(s))[-1] == "one,die,four one,die,four 4 3"
