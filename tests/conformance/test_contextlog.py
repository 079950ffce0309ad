"""The log's suite on each implementation, and on logs of which hardly anything is left in rows."""

import asyncio

import pytest

from recess.blobs import MemoryBlobs
from recess.contextlog import SCHEMA, DirectoryBodies, LogKeeper, MemoryLog, Sealing, SqlLog
from recess.db import Database
from recess.testing.contextlog_suite import ContextLogSuite

TABLES = ("log_session", "log_entry", "log_key", "log_delta", "log_mark", "log_segment", "log_blob")


class SealedLog(SqlLog):
    """Seals after every append, two entries to a segment, all but the newest."""

    def __init__(self, db, bodies):
        super().__init__(db, bodies, blobs=MemoryBlobs())
        self.keeper = LogKeeper(self, sealing=Sealing(entries=2, keep=1, closed_min=1))

    async def append(self, session, epoch, drafts):
        done = await super().append(session, epoch, drafts)
        await self.keeper.seal(session)
        return done

    async def append_inbox(self, session, draft):
        done = await super().append_inbox(session, draft)
        await self.keeper.seal(session)
        return done


@pytest.fixture(scope="module")
def shared(postgres):
    """One database for all tests here: making one takes longer than most of them."""
    opened = Database.open(postgres.database(), [SCHEMA])
    yield opened
    asyncio.run(opened.close())


@pytest.fixture(params=["sqlite", "postgres"])
async def db(request, tmp_path):
    if request.param == "postgres":
        opened = request.getfixturevalue("shared")
        await opened.write(lambda tx: [tx.execute(f"DELETE FROM {table}") for table in TABLES])
        yield opened
        return
    opened = Database.open(tmp_path / "recess.db", [SCHEMA])
    yield opened
    await opened.close()


class TestMemoryLog(ContextLogSuite):
    @pytest.fixture
    async def log(self):
        return MemoryLog()


class TestSqlLog(ContextLogSuite):
    @pytest.fixture
    async def log(self, db, tmp_path):
        return SqlLog(db, DirectoryBodies(tmp_path / "bodies"))


class TestSealedLog(ContextLogSuite):
    @pytest.fixture
    async def log(self, db, tmp_path):
        log = SealedLog(db, DirectoryBodies(tmp_path / "bodies"))
        yield log
        log.keeper.close()
