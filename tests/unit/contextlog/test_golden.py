"""A log written by format version 1 is read as it was: files made once, never regenerated."""

import base64
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest

from recess.contextlog import SCHEMA, DirectoryBodies, Draft, SqlLog
from recess.db import Database
from recess.errors import KeyReused

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
async def opened(tmp_path):
    expected = json.loads((GOLDEN / "log_v1.json").read_text().replace("@SPAM@", "spam " * 4000))
    with sqlite3.connect(tmp_path / "recess.db") as conn:
        conn.executescript((GOLDEN / "log_v1.sql").read_text())
    conn.close()
    for name, data in expected["bodies"].items():
        path = tmp_path / "bodies" / name[:2] / name
        path.parent.mkdir(parents=True)
        path.write_bytes(base64.b64decode(data))
    db = Database.open(tmp_path / "recess.db", [SCHEMA])
    yield SqlLog(db, DirectoryBodies(tmp_path / "bodies")), expected
    await db.close()


async def test_version_1_is_read_as_it_was_written(opened):
    log, expected = opened
    assert [asdict(await log.get(s["id"])) for s in expected["sessions"]] == expected["sessions"]
    for session, entries in expected["entries"].items():
        assert [asdict(e) for e in await log.read(session)] == entries
    assert [e.position for e in await log.tail("ses_aaa")] == expected["tail"]
    assert [asdict(d) for d in await log.deltas("ses_aaa")] == expected["deltas"]


async def test_keys_of_version_1_still_hold(opened):
    log, _ = opened
    again = Draft("user", {"text": "héllo"}, key="m1")
    assert (await log.append_inbox("ses_aaa", again)).replayed
    with pytest.raises(KeyReused):
        await log.append_inbox("ses_aaa", Draft("user", {"text": "other"}, key="m1"))
    big = Draft("tool.result", {"output": "spam " * 4000}, turn=1, ref="c1", key="t1/p0/c0/result")
    assert [(a.position, a.replayed) for a in await log.append("ses_aaa", 1, [big])] == [(5, True)]
