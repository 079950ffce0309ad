"""Full disks, damaged rows, missing rows, torn write-ahead logs: typed errors, and what was there stays there."""

import asyncio
import os
import shutil
import sqlite3

import pytest

from recess.contextlog import SCHEMA, Delta, DirectoryBodies, Draft, SqlLog
from recess.db import Database
from recess.errors import Corrupt, OutOfSpace
from recess.testing.small_disk import small_disk

BIG = os.urandom(300_000).hex()


@pytest.fixture
async def opened(tmp_path):
    db = Database.open(tmp_path / "recess.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(tmp_path / "bodies"))
    row = await log.create(agent="a", code_version="v")
    row = await log.claim(row.id, "n", 1e12, now=0.0)
    yield db, log, row
    await db.close()


async def test_a_full_database_refuses_and_keeps_what_it_has(opened):
    db, log, row = opened
    await log.append(row.id, row.epoch, [Draft("note", {"i": 1})])
    pages = await db.write(lambda tx: tx.one("PRAGMA page_count")[0])
    await db.write(lambda tx: tx.execute(f"PRAGMA max_page_count={pages + 2}"))
    drafts = [Draft("note", {"text": "x" * 15_000}) for _ in range(20)]
    with pytest.raises(OutOfSpace) as caught:
        await log.append(row.id, row.epoch, drafts)
    assert caught.value.hint
    assert [e.body for e in await log.read(row.id)] == [{"i": 1}]
    assert (await log.get(row.id)).head == 1
    await db.write(lambda tx: tx.execute("PRAGMA max_page_count=1000000"))
    assert [a.position for a in await log.append(row.id, row.epoch, drafts)] == list(range(2, 22))


@pytest.mark.mounts
async def test_a_full_body_store_refuses_and_leaves_no_half_file(tmp_path):
    with small_disk(tmp_path / "small", 256 << 10) as small:
        db = Database.open(tmp_path / "recess.db", [SCHEMA])
        log = SqlLog(db, DirectoryBodies(small / "bodies"))
        row = await log.create(agent="a", code_version="v")
        with pytest.raises(OutOfSpace):
            await log.append_inbox(row.id, Draft("user", {"text": BIG}, key="k"))
        assert await log.read(row.id) == []
        assert [p for p in small.rglob("*") if p.is_file()] == []
        assert (await log.append_inbox(row.id, Draft("user", {"text": "y" * 50_000}, key="k"))).position == 1
        await db.close()


@pytest.mark.parametrize("damage", ["body = '{'", "body = '[1]'", "body = NULL", "body = x'ff'"])
async def test_a_damaged_entry_is_named_and_the_rest_can_be_read(opened, damage):
    db, log, row = opened
    await log.append(row.id, row.epoch, [Draft("note", {"i": i}) for i in (1, 2, 3)])
    await db.write(lambda tx: tx.execute(f"UPDATE log_entry SET {damage} WHERE position = 2"))
    with pytest.raises(Corrupt, match=f"entry 2 of session {row.id}") as caught:
        await log.read(row.id)
    assert caught.value.details["position"] == 2
    child = await log.fork(row.id, at=1)
    assert [e.body for e in await log.read(child.id)] == [{"i": 1}]


@pytest.mark.parametrize("gone", [1, 2, 3])
async def test_a_missing_entry_is_noticed(opened, gone):
    db, log, row = opened
    await log.append(row.id, row.epoch, [Draft("note", {}) for _ in range(3)])
    await db.write(lambda tx: tx.execute("DELETE FROM log_entry WHERE position = ?", (gone,)))
    for call in (log.read(row.id), log.tail(row.id)):
        with pytest.raises(Corrupt, match=f"entry {gone} "):
            await call


@pytest.mark.parametrize("damage", ["labels = '{'", "meta = '[]'", "lineage = '{}'", "lineage = '[[1]]'", "head = 'x'"])
async def test_a_damaged_session_is_named(opened, damage):
    db, log, row = opened
    await log.append(row.id, row.epoch, [Draft("note", {})])
    await db.write(lambda tx: tx.execute(f"UPDATE log_session SET {damage}"))
    for call in (log.get(row.id), log.read(row.id), log.append(row.id, row.epoch, [Draft("note", {})])):
        with pytest.raises(Corrupt, match=row.id):
            await call


async def test_a_lost_or_flipped_body_is_named(opened, tmp_path):
    _, log, row = opened
    await log.append(row.id, row.epoch, [Draft("note", {"text": BIG})])
    (path,) = [p for p in (tmp_path / "bodies").rglob("*") if p.is_file()]
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Corrupt, match=f"entry 1 of session {row.id}"):
        await log.read(row.id)
    path.unlink()
    with pytest.raises(Corrupt, match=f"entry 1 of session {row.id}"):
        await log.tail(row.id)


async def test_a_torn_write_ahead_log_gives_a_prefix_of_the_appends(opened, tmp_path):
    """A host that loses power in mid-write tears the WAL's end: what is before it is whole, transactions are not split."""
    _, log, row = opened
    for i in range(30):
        await log.append(row.id, row.epoch, [Draft("note", {"i": i, "half": h}) for h in (0, 1)])
    await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "x"))
    wal = (tmp_path / "recess.db-wal").read_bytes()
    assert len(wal) > 40_000
    for cut in (len(wal) - 1, len(wal) - 5_000, len(wal) // 2, 10_000):
        copy = tmp_path / f"copy{cut}"
        copy.mkdir()
        shutil.copy(tmp_path / "recess.db", copy / "recess.db")
        (copy / "recess.db-wal").write_bytes(wal[:cut])
        db = Database.open(copy / "recess.db", [SCHEMA])
        torn = SqlLog(db, DirectoryBodies(copy / "bodies"))
        sessions = await torn.list_sessions()
        entries = await torn.read(sessions[0].id) if sessions else []
        assert [(e.body["i"], e.body["half"]) for e in entries] == [(n // 2, n % 2) for n in range(len(entries))]
        assert len(entries) % 2 == 0
        assert not sessions or sessions[0].head == len(entries)
        await db.close()


async def test_a_damaged_page_is_corrupt_and_not_a_wrong_answer(tmp_path):
    db = Database.open(tmp_path / "recess.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(tmp_path / "bodies"))
    row = await log.create(agent="a", code_version="v")
    row = await log.claim(row.id, "n", 1e12, now=0.0)
    await log.append(row.id, row.epoch, [Draft("note", {"t": "x" * 2_000}) for _ in range(200)])
    await db.close()
    raw = bytearray((tmp_path / "recess.db").read_bytes())
    for page in range(20, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 16] = b"\xff" * 16
    (tmp_path / "recess.db").write_bytes(raw)
    db = Database.open(tmp_path / "recess.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(tmp_path / "bodies"))
    with pytest.raises(Corrupt):
        await log.read(row.id)
    await db.close()


async def test_a_backup_tool_that_holds_the_file_only_delays(opened, tmp_path):
    _, log, row = opened
    other = sqlite3.connect(tmp_path / "recess.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.ensure_future(log.append(row.id, row.epoch, [Draft("note", {})]))
    assert await log.read(row.id) == []  # readers are not held up
    other.execute("ROLLBACK")
    other.close()
    assert (await waiting)[0].position == 1
