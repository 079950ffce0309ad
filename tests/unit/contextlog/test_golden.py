"""A log written by format version 1 is read as it was: files made once, never regenerated."""

import base64
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest

from recess.contextlog import SCHEMA, DirectoryBodies, Draft, SqlLog
from recess.db import Database
from recess.db.portable import lines_of, load, shapes
from recess.errors import KeyReused

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(params=["sqlite", "postgres"])
async def opened(request, tmp_path):
    expected = json.loads((GOLDEN / "log_v1.json").read_text().replace("@SPAM@", "spam " * 4000))
    with sqlite3.connect(tmp_path / "recess.db") as conn:
        conn.executescript((GOLDEN / "log_v1.sql").read_text())
    conn.close()
    for name, data in expected["bodies"].items():
        path = tmp_path / "bodies" / name[:2] / name
        path.parent.mkdir(parents=True)
        path.write_bytes(base64.b64decode(data))
    where = tmp_path / "recess.db"
    if request.param == "postgres":
        where = await moved(where, request.getfixturevalue("postgres").database())
    db = Database.open(where, [SCHEMA])
    yield SqlLog(db, DirectoryBodies(tmp_path / "bodies")), expected
    await db.close()


async def moved(file, where):
    """Put the rows as they are into a Postgres of the same version, as one of that time had them."""
    old, new = (Database.open(one, [SCHEMA.up_to(1)]) for one in (file, where))
    tables = await old.read(lambda tx: [(s.name, s.columns, list(lines_of(tx, s))) for s in shapes(tx, ["log_"])])
    await load(new, lambda: tables, ["log_"])
    await old.close()
    await new.close()
    return where


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
