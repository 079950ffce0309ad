"""Blobs through sealing, sweeps, damage: kept as long as an open session reaches them and a day longer, then given back; what nobody
named goes, too, and nothing else."""

import asyncio
import hashlib

import pytest

from recess.blobs import LocalBlobs
from recess.contextlog import SCHEMA, DirectoryBodies, Draft, LogKeeper, Sealing, SqlLog
from recess.contextlog.checking import check
from recess.db import Database
from recess.errors import Corrupt
from recess.testing.contextlog_blobs import put, read
from recess.testing.session_world import JumpClock

A_DAY_S = 86_400.0
OTHER_DAY = -1e6  # as a grace period: whatever is there counts as old


class Opened:
    def __init__(self, where, folder):
        self.clock = JumpClock()
        self.db = Database.open(where, [SCHEMA])
        self.folder = folder / "bodies"
        self.log = SqlLog(self.db, DirectoryBodies(self.folder), self.clock, blobs=LocalBlobs(folder / "blobs"))
        self.keeper = LogKeeper(self.log, self.clock, sealing=Sealing(entries=4, keep=1, closed_min=1))

    async def session(self):
        row = await self.log.create(agent="a", code_version="v")
        return await self.log.claim(row.id, "n", 1e12, now=0.0)

    async def kept(self, session):
        return [await read(self.log, one) for one in await self.log.find_blobs(session)]

    async def files(self):
        return await asyncio.to_thread(lambda: sum(path.is_file() for path in self.folder.rglob("*")))

    async def sweep(self, *, after_s=0.0):
        """A round of the sweep, that much later; every body counts as old."""
        self.clock.jump(after_s)
        return await self.keeper.sweep(grace_s=OTHER_DAY)

    async def problems(self):
        return [line async for line in check(self.log, deep=True)]


@pytest.fixture(params=["sqlite", "postgres"])
async def opened(request, tmp_path):
    where = tmp_path / "recess.db" if request.param == "sqlite" else request.getfixturevalue("postgres").database()
    one = Opened(where, tmp_path)
    yield one
    one.keeper.close()
    await one.db.close()


async def test_what_is_named_stays_and_what_is_not_goes(opened):
    row = await opened.session()
    await put(opened.log, row, b"named")
    await opened.log.put_piece(b"a crash came before its entry")
    assert await opened.files() == 2
    assert (await opened.sweep()).bodies == 1
    assert await opened.kept(row.id) == [b"named"]


async def test_a_sealed_entry_keeps_its_blob(opened):
    row = await opened.session()
    await put(opened.log, row, b"sealed")
    await opened.log.append(row.id, row.epoch, [Draft("note", {"i": i}) for i in range(8)])
    assert await opened.keeper.seal(row.id) == 2
    await opened.sweep()
    assert await opened.kept(row.id) == [b"sealed"]
    assert (await opened.log.read(row.id))[0].body["size"] == 6
    assert await opened.problems() == []


async def test_a_closed_sessions_blobs_go_a_day_later_and_its_entries_stay(opened):
    row, other = await opened.session(), await opened.session()
    await put(opened.log, row, b"mine")
    await put(opened.log, other, b"mine")  # the same bytes are stored once
    await opened.log.close(row.id)
    await opened.sweep()
    assert await opened.kept(row.id) == [b"mine"]  # noted, and kept for a day
    await opened.sweep(after_s=A_DAY_S / 2)
    assert await opened.kept(row.id) == [b"mine"]
    await opened.sweep(after_s=A_DAY_S)
    assert await opened.kept(row.id) == []
    assert [e.kind for e in await opened.log.read(row.id)] == ["blob"]
    assert await opened.kept(other.id) == [b"mine"]
    assert await opened.problems() == []
    await opened.log.close(other.id)
    await opened.sweep()
    await opened.sweep(after_s=2 * A_DAY_S)
    assert await opened.files() == 0


async def test_a_fork_keeps_what_it_inherited_of_a_closed_session(opened):
    row = await opened.session()
    await put(opened.log, row, b"before")
    await opened.log.close(row.id)
    await opened.sweep()
    child = await opened.log.fork(row.id)  # in the day of grace
    for _ in range(3):
        await opened.sweep(after_s=2 * A_DAY_S)
    assert await opened.kept(child.id) == [b"before"]
    await opened.log.close(child.id)
    for _ in range(2):
        await opened.sweep(after_s=2 * A_DAY_S)
    assert await opened.files() == 0


async def test_a_damaged_piece_is_told_by_a_deep_check(opened):
    row = await opened.session()
    await put(opened.log, row, b"whole")
    (path,) = await asyncio.to_thread(lambda: [p for p in opened.folder.rglob("*") if p.is_file()])
    path.write_bytes(b"no zstd")
    (problem,) = await opened.problems()
    assert row.id in problem
    assert "a piece of a blob" in problem
    with pytest.raises(Corrupt):
        await opened.kept(row.id)
    assert hashlib.sha256(b"whole").hexdigest() == (await opened.log.find_blobs(row.id))[0].hash
