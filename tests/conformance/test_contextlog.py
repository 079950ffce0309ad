"""The log's suite on each implementation."""

import pytest

from recess.contextlog import SCHEMA, DirectoryBodies, MemoryLog, SqliteLog
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
        yield SqliteLog(db, DirectoryBodies(tmp_path / "bodies"))
        await db.close()
