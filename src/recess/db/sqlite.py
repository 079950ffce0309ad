"""One SQLite file: one writer connection with group commit, a few readers, typed errors. It must know no table of any room.

SQLite has one write lock anyway, so a batch of writes is one transaction, each in its own savepoint (one that is alone needs
none): one's failure does not hurt its neighbours. Crash safety: WAL with synchronous=FULL; outcomes are told only after COMMIT returned, that is after the
fsync of the log that holds them. A relaxed batch is committed with synchronous=NORMAL and made durable by the next one
that is not, because the WAL is synced in order.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from recess.db.contract import SQLITE, Row, Tx
from recess.db.database import Database, Job, Outcome
from recess.db.errors import UniqueViolation, primary_code, translate
from recess.db.migrations import RoomSchema, migrate

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0  # a foreign program (a backup, the sqlite3 shell) may hold the file for a moment
CACHE_KIB = 8192


class SqliteTx(Tx):
    """A transaction on a connection of ours. A statement fails in the call that ran it."""

    dialect = SQLITE

    def __init__(self, conn: sqlite3.Connection) -> None:
        super().__init__()
        self._conn = conn

    def execute(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Run one statement and return its rows."""
        return self._conn.execute(sql, params).fetchall()

    def attempt(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Run one statement; SQLite undoes a refused one by itself, and the transaction goes on."""
        try:
            return self._conn.execute(sql, params).fetchall()
        except sqlite3.IntegrityError as exc:
            if exc.sqlite_errorcode in (sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY):
                raise UniqueViolation(str(exc)) from exc
            raise

    def one(self, sql: str, params: Sequence[object] = ()) -> Row | None:
        """Run one statement and return its first row, or None."""
        row: Row | None = self._conn.execute(sql, params).fetchone()
        return row


class _BatchLost(Exception):
    """SQLite rolled the whole transaction back under us (disk full, I/O error): the other writes must run again."""


class SqliteDatabase(Database):
    """`Database` on one file."""

    dialect = SQLITE

    def __init__(self, path: Path, writer: sqlite3.Connection, readers: int) -> None:
        super().__init__(readers)
        self.path = path
        self.name = str(path)
        self._writer = writer
        self._full_sync = True
        self._local = threading.local()
        self._reader_conns: list[sqlite3.Connection] = []
        self._thread.start()

    @classmethod
    def open_file(cls, path: Path, schemas: Sequence[RoomSchema], *, readers: int = 2) -> SqliteDatabase:
        """Open or make the file (see `Database.open`)."""
        conn: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600, exist_ok=True)
            conn = connect(path)
            conn.execute("PRAGMA journal_mode=WAL")
            conn.execute("PRAGMA synchronous=FULL")
            migrate(conn, schemas)
        except BaseException as exc:
            if conn is not None:
                conn.close()
            raise translate(exc, str(path)) from exc
        return cls(path, conn, readers)

    def listen(self, heard: Callable[[str], None]) -> None:
        """Never call: a file has one node."""

    def _disconnect(self) -> None:
        for conn in self._reader_conns:
            conn.close()
        self._writer.close()

    # --- reading

    def _read(self, fn: Callable[[Tx], T]) -> T:
        try:
            conn = self._reader()
            conn.execute("BEGIN")
            try:
                return fn(SqliteTx(conn))
            finally:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
        except BaseException as exc:
            raise translate(exc, str(self.path)) from exc

    def _reader(self) -> sqlite3.Connection:
        conn: sqlite3.Connection | None = getattr(self._local, "conn", None)
        if conn is None:
            conn = connect(self.path)
            conn.execute("PRAGMA query_only=1")
            self._local.conn = conn
            self._reader_conns.append(conn)
        return conn

    # --- writing

    def _run(self, jobs: list[Job]) -> list[Outcome]:
        """Run a batch in one commit; if SQLite loses the whole of it to one write's lack of space, one commit each."""
        if not jobs:
            return []
        try:
            return self._attempt(jobs)
        except _BatchLost as lost:
            cause = lost.__cause__ or lost
            if len(jobs) > 1 and primary_code(cause) == sqlite3.SQLITE_FULL:
                return [outcome for job in jobs for outcome in self._run([job])]
            error = translate(cause, str(self.path))
            return [Outcome(job, error=error) for job in jobs]

    def _attempt(self, jobs: list[Job]) -> list[Outcome]:
        conn = self._writer
        try:
            self._sync_mode(full=any(job.durable for job in jobs))
            conn.execute("BEGIN IMMEDIATE")
            outcomes = [self._savepoint(job) for job in jobs] if len(jobs) > 1 else [self._alone(jobs[0])]
            if conn.in_transaction:
                conn.execute("COMMIT")
        except BaseException as exc:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise _BatchLost from (exc.__cause__ if isinstance(exc, _BatchLost) else exc)
        return outcomes

    def _alone(self, job: Job) -> Outcome:
        """Run the only write of a transaction, which ends with it if it fails."""
        conn, tx = self._writer, SqliteTx(self._writer)
        try:
            value = job.fn(tx)
        except BaseException as exc:
            if not conn.in_transaction:
                raise _BatchLost from exc
            conn.execute("ROLLBACK")
            return Outcome(job, error=translate(exc, str(self.path)))
        return Outcome(job, value=value, committed=tx.committed)

    def _savepoint(self, job: Job) -> Outcome:
        conn, tx = self._writer, SqliteTx(self._writer)
        conn.execute("SAVEPOINT job")
        try:
            value = job.fn(tx)
        except BaseException as exc:
            if not conn.in_transaction:
                raise _BatchLost from exc
            conn.execute("ROLLBACK TO job")
            conn.execute("RELEASE job")
            return Outcome(job, error=translate(exc, str(self.path)))
        conn.execute("RELEASE job")
        return Outcome(job, value=value, committed=tx.committed)

    def _sync_mode(self, *, full: bool) -> None:
        if full != self._full_sync:
            self._writer.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
            self._full_sync = full


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection with our settings, in autocommit mode. Raises sqlite3.Error."""
    conn = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    conn.row_factory = sqlite3.Row
    conn.execute("PRAGMA foreign_keys=ON")
    conn.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    conn.execute("PRAGMA temp_store=MEMORY")
    return conn
