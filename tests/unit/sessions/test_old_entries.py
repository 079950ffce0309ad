"""The contract with logs that older versions wrote: today's runtime and today's agent code read them and go on."""

import base64
import json
import sqlite3
from pathlib import Path

import pytest

from recess.catalog import AgentVersion
from recess.contextlog import SCHEMA, DirectoryBodies, SqlLog
from recess.contextlog.contract import Draft
from recess.contextlog.transcript import check_transcript, messages
from recess.db import Database
from recess.testing.session_world import notes, texts, world

GOLDEN = Path(__file__).parents[2] / "golden"
AGENT = """
from recess_agent import agent, tool

@tool
def sh(cmd: str) -> str:
    raise SystemError("a call that had ended is not run again")

async def model(messages):
    yield "VERSION has read " + str(len(messages))

@agent(image="base", idle="1h", tools=[sh])
async def coder(s):
    async for turn in s:
        seen = [m["content"] for m in s.messages()]
        await s.stream(model(s.messages()))
        await s.note(version="VERSION", seen=[(one or "")[:400] for one in seen], kinds=[one["kind"] for one in s.log])
"""


@pytest.fixture
async def log(tmp_path):
    bodies = json.loads((GOLDEN / "log_v1.json").read_text())["bodies"]
    with sqlite3.connect(tmp_path / "recess.db") as conn:
        conn.executescript((GOLDEN / "log_v1.sql").read_text())
    conn.close()
    for name, data in bodies.items():
        path = tmp_path / "bodies" / name[:2] / name
        path.parent.mkdir(parents=True)
        path.write_bytes(base64.b64decode(data))
    db = Database.open(tmp_path / "recess.db", [SCHEMA])
    yield SqlLog(db, DirectoryBodies(tmp_path / "bodies"))
    await db.close()


def old_version(w, source):
    """Make the version that the log names one that is deployed, as it was at that time."""
    made = AgentVersion("coder", "v1", 0, 0.0, 0, {})
    w.agents._versions["coder"] = [(made, {"agent.py": source.encode()})]


async def test_a_session_of_format_1_goes_on_under_todays_code(log):
    async with world(log=log, idle_timeout_s=60.0) as w:
        old_version(w, AGENT.replace("VERSION", "old"))
        await w.sessions.recover()
        await w.sessions.send("ses_aaa", "what now?", key="m2")
        await w.until("ses_aaa", "turn.end", timeout_s=60)  # the turn that was open when that version stopped
        await w.until("ses_aaa", "turn.end", count=2, timeout_s=60)
        await w.sessions.deploy("coder", {"agent.py": AGENT.replace("VERSION", "new")})
        await w.sessions.send("ses_aaa", "and now?", key="m3")
        await w.until("ses_aaa", "turn.end", count=3, timeout_s=60)
        entries = await w.entries("ses_aaa")
        assert [e.body["status"] for e in entries if e.kind == "turn.end"] == ["done"] * 3
        said = notes(entries)
        assert [one["version"] for one in said] == ["old", "old", "new"]
        assert any("listed" in text for text in said[-1]["seen"]), "the old compaction stands for what was before it"
        assert any("what now?" in text for text in said[-1]["seen"])
        assert "x.mine" in said[-1]["kinds"], "what it does not know it keeps"
        assert not check_transcript(messages(entries))
        assert [e.ref for e in entries if e.kind == "tool.start"] == ["c1"], "the call of that time was not run again"
        assert [e.position for e in entries] == list(range(1, len(entries) + 1))


async def test_kinds_and_fields_of_later_versions_are_kept_and_passed_over():
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("coder", {"agent.py": AGENT.replace("VERSION", "one")})
        s = (await w.sessions.start("coder")).id
        await w.say(s, "hi", turn=1)
        supervisor = w.sessions._live[s]
        await supervisor.command(
            lambda: supervisor.desk.append(
                [
                    Draft("x.tomorrow", {"deep": {"er": [1, None]}}, schema=9),
                    Draft("note", {"by": "a later version", "new": True}, schema=7),
                    Draft("machine.lost", {"why": "a word of tomorrow", "vector": [1, 2]}, schema=5),
                ]
            )
        )
        await w.crash_server()
        await w.sessions.recover()
        log_ = await w.say(s, "still there?", turn=2)
        assert texts(log_)[-1].startswith("one has read")
        kept = [e for e in log_ if e.schema > 1]
        assert [(e.kind, e.schema) for e in kept] == [("x.tomorrow", 9), ("note", 7), ("machine.lost", 5)]
        assert kept[0].body == {"deep": {"er": [1, None]}}
