"""The log's suite on each implementation."""

import pytest

from recess.blobs import MemoryBlobs
from recess.contextlog import SCHEMA, DirectoryBodies, MemoryLog, SqlLog
from recess.db import Database
from recess.testing.contextlog_suite import ContextLogSuite


class TestMemoryLog(ContextLogSuite):
    @pytest.fixture
    async def log(self):
        return MemoryLog()


class TestSqliteLog(ContextLogSuite):
    @pytest.fixture
    async def log(self, tmp_path):
        db = Database.open(tmp_path / "recess.db", [SCHEMA])
        yield SqlLog(db, DirectoryBodies(tmp_path / "bodies"), blobs=MemoryBlobs())
        await db.close()


class TestPostgresLog(ContextLogSuite):
    @pytest.fixture
    async def log(self, tmp_path, postgres):
        db = Database.open(postgres.database(), [SCHEMA])
        yield SqlLog(db, DirectoryBodies(tmp_path / "bodies"), blobs=MemoryBlobs())
        await db.close()
