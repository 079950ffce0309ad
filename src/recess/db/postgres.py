"""One Postgres, shared by any number of nodes: the same writer thread with group commit as on SQLite. It must know no table.

How a batch is written: one transaction on one connection. It first takes the locks that its writes name, sorted, as
advisory locks: two nodes never wait for each other in a circle, and what is read under such a lock is still true when it is
written (READ COMMITTED; each statement sees what was committed before it). Statements without rows are sent with the
next one that has some (pipeline mode), the commit with the last of them; what the writes of a batch ask for first is asked for
together. So a batch of appends to different sessions costs two round trips, however many they are.

A write that fails before it changed anything is simply left out. Any other failure undoes the batch, which is then
repeated write by write: only the guilty one fails.

Crash safety: outcomes are told after COMMIT was answered (synchronous_commit=on: after the fsync of the server's log). When the
connection breaks, the transaction's own number tells the next connection what became of it: committed, or to be run again.
If the server cannot be asked, the writes fail with Unavailable: nobody may take them for done, and keys make repeating
them harmless. A node that stands still inside a transaction loses it to the server's `idle_in_transaction_session_timeout`,
so that it holds no other node up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeVar

import psycopg

from recess.db.contract import FOR_UPDATE, POSTGRES, Row, Tx
from recess.db.database import Database, Job, Outcome
from recess.db.errors import UniqueViolation
from recess.db.migrations import RoomSchema, migrate
from recess.db.postgres_errors import translate, worth_repeating
from recess.db.postgres_link import Session, open_session
from recess.db.postgres_notices import Listener, payloads
from recess.errors import RecessError, Unavailable
from recess.ids import new_id

T = TypeVar("T")

REPEATS_MAX = 3
ASK_TRIES = 20
ASK_EVERY_S = 0.1  # a backend whose client is gone still ends its commit
SAVEPOINT = "recess_attempt"


@lru_cache(maxsize=1024)
def in_postgres(sql: str) -> tuple[str, bool, bool]:
    """Return our SQL with `$1`... for its marks, whether it returns rows, and whether it changes any. No literal of ours
    contains a question mark."""
    parts = sql.split("?")
    text = "".join(f"{part}${n}" for n, part in enumerate(parts[:-1], 1)) + parts[-1]
    start, words = sql.lstrip().upper(), sql.upper()
    changes = not start.startswith(("SELECT", "WITH"))
    if start.startswith("WITH"):  # what only reads names its columns, not these
        changes = any(word in words for word in ("INSERT INTO ", "UPDATE ", "DELETE FROM "))
    return text, not changes or " RETURNING " in sql, changes


def lock_key(schema: str, word: str) -> int:
    """Return the number of the advisory lock for a word; words that share one by chance only wait for each other."""
    return int.from_bytes(blake2b(f"{schema}\x00{word}".encode(), digest_size=8).digest(), "big", signed=True)


Asked = dict[tuple[str, tuple[object, ...]], "psycopg.Cursor[Any]"]  # queries that were sent ahead, answers at hand


class PostgresTx(Tx):
    """A transaction on a session in pipeline mode."""

    dialect = POSTGRES

    def __init__(
        self, conn: psycopg.Connection[Any], pipeline: psycopg.Pipeline, *, writes: bool, asked: Asked | None = None
    ) -> None:
        super().__init__()
        self._asked = asked or {}
        self._conn = conn
        self._pipeline = pipeline
        self.for_update = FOR_UPDATE[POSTGRES] if writes else ""
        self.skip_locked = " FOR UPDATE SKIP LOCKED" if writes else ""
        self.changed = False  # or may have: a statement that changes something was sent

    def execute(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Run one statement. One without rows is sent with the next that has some, and fails there."""
        asked = self._asked.pop((sql, tuple(params)), None) if self._asked else None
        if asked is not None:
            return asked.fetchall()
        text, gives_rows, changes = in_postgres(sql)
        self.changed = self.changed or changes
        cursor = self._conn.execute(text, params)
        if not gives_rows:
            return []
        # Not a mere flush: only a server that is ready for the next query counts how long it waits for it.
        self._pipeline.sync()
        return cursor.fetchall()

    def attempt(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Run one statement in a savepoint: Postgres gives the whole transaction up for a failed statement."""
        text, gives_rows, _ = in_postgres(sql)
        self.changed = True
        self._conn.execute(f"SAVEPOINT {SAVEPOINT}")
        self._pipeline.sync()  # what failed before this is not the attempt's fault
        try:
            cursor = self._conn.execute(text, params)
            self._pipeline.sync()
            rows = cursor.fetchall() if gives_rows else []
        except psycopg.errors.UniqueViolation as exc:
            self._conn.execute(f"ROLLBACK TO {SAVEPOINT}")
            raise UniqueViolation(exc.diag.message_primary or str(exc)) from exc
        self._conn.execute(f"RELEASE {SAVEPOINT}")
        return rows

    def one(self, sql: str, params: Sequence[object] = ()) -> Row | None:
        """Run one statement and return its first row, or None."""
        rows = self.execute(sql, params)
        return rows[0] if rows else None


class _Lost(Exception):
    """The connection broke. `xid` is the transaction whose commit was under way, "" if none was; `outcomes` are what its
    writes have become if that went through."""

    def __init__(self, xid: str, outcomes: list[Outcome]) -> None:
        super().__init__(xid)
        self.xid = xid
        self.outcomes = outcomes


class PostgresDatabase(Database):
    """`Database` on a Postgres server. Make it with `connect`."""

    dialect = POSTGRES

    def __init__(self, url: str, writer: Session, readers: int) -> None:
        super().__init__(readers)
        self.url = url
        self.name = writer.name
        self.node = new_id("nod")
        self._schema = writer.schema
        self._writer: Session | None = writer
        self._local = threading.local()
        self._reader_sessions: set[Session] = set()
        self._listener: Listener | None = None
        self._thread.start()

    @classmethod
    def connect(cls, url: str, schemas: Sequence[RoomSchema], *, readers: int = 2) -> PostgresDatabase:
        """Connect, and run what migrations are due (see `Database.open`). Raises Refused too, for a wrong password."""
        session = open_session(url)
        try:
            migrate(session.conn, schemas, POSTGRES)
        except BaseException as exc:
            session.close()
            raise translate(exc, session.name) from exc
        return cls(url, session, readers)

    def listen(self, heard: Callable[[str], None]) -> None:
        """Start to listen; see `Database.listen`."""
        if self._listener is None:
            self._listener = Listener(self.url, self._schema, self.node)
            self._listener.start()
        self._listener.add(heard)

    def _disconnect(self) -> None:
        if self._listener is not None:
            self._listener.stop()
        for session in (*self._reader_sessions, self._writer):
            if session is not None:
                session.close()

    # --- reading

    def _read(self, fn: Callable[[Tx], T]) -> T:
        for last in (False, True):
            session: Session | None = getattr(self._local, "session", None)
            try:
                if session is None:
                    session = self._local.session = open_session(self.url)
                    self._reader_sessions.add(session)
                return _read_in(session, fn)
            except BaseException as exc:
                if session is None or not session.lost(exc):
                    raise translate(exc, self.name) from exc
                self._reader_sessions.discard(session)
                self._local.session = None
                session.close()
                if last:
                    raise translate(exc, self.name) from exc
        raise AssertionError("unreachable")

    # --- writing

    def _run(self, jobs: list[Job]) -> list[Outcome]:
        cause: BaseException = Unavailable(f"database {self.name} was not reached")
        for _ in range(REPEATS_MAX if jobs else 0):
            try:
                session = self._session()
            except BaseException as exc:
                cause = exc
                break
            try:
                return self._attempt(session, jobs)
            except _Lost as lost:
                cause = lost.__cause__ or lost
                fate = self._fate(lost.xid) if lost.xid else "aborted"
                if fate == "committed":
                    return lost.outcomes
                if fate != "aborted":
                    break
            except BaseException as exc:
                cause = exc
                if worth_repeating(exc):
                    continue
                if len(jobs) > 1:
                    return [outcome for job in jobs for outcome in self._run([job])]
                break
        error = translate(cause, self.name)
        return [Outcome(job, error=error) for job in jobs]

    def _attempt(self, session: Session, jobs: list[Job]) -> list[Outcome]:
        """Run a batch in one transaction. Raises what undid it, _Lost if that was the end of the connection."""
        conn, xid = session.conn, ""
        outcomes: list[Outcome] = []
        try:
            with conn.pipeline() as pipeline:
                number = self._begin(conn, jobs)
                notices: list[str] = []
                asked = _ask_ahead(conn, pipeline, jobs)
                for job, answers in zip(jobs, asked, strict=True):
                    outcome, told = _one(conn, pipeline, job, answers)
                    outcomes.append(outcome)
                    notices += told
                xid = str(number.fetchall()[0][0])
                conn.execute("COMMIT")
                # After the commit, not in it: a NOTIFY inside would make all nodes' commits wait for each other's fsync.
                for payload in payloads(self.node, notices):
                    conn.execute("SELECT pg_notify($1, $2)", (session.channel, payload))
        except BaseException as exc:
            if session.lost(exc):
                self._drop_writer()
                raise _Lost(xid, outcomes) from exc
            with contextlib.suppress(psycopg.Error):
                conn.execute("ROLLBACK")
            raise
        return outcomes

    def _begin(self, conn: psycopg.Connection[Any], jobs: list[Job]) -> psycopg.Cursor[Any]:
        conn.execute("BEGIN")
        if not any(job.durable for job in jobs):
            conn.execute("SET LOCAL synchronous_commit = off")
        keys = sorted({lock_key(self._schema, word) for job in jobs for word in job.locks})
        # One statement for both, taken in the order of the array: every statement is a packet, and a wake-up of the server.
        return conn.execute(
            "SELECT pg_current_xact_id()::text, (SELECT count(pg_advisory_xact_lock(k)) FROM unnest($1::bigint[]) AS k)",
            (keys,),
        )

    def _session(self) -> Session:
        if self._writer is None:
            self._writer = open_session(self.url)
        return self._writer

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _fate(self, xid: str) -> str:
        """Ask what became of a transaction whose connection broke: committed | aborted | unknown."""
        for _ in range(ASK_TRIES):
            try:
                row = self._session().conn.execute("SELECT pg_xact_status($1::xid8)", (xid,)).fetchone()
            except (RecessError, psycopg.Error):
                self._drop_writer()
                return "unknown"
            if row is None or row[0] != "in progress":
                return str(row[0]) if row is not None and row[0] else "unknown"
            time.sleep(ASK_EVERY_S)
        return "unknown"


def _ask_ahead(conn: psycopg.Connection[Any], pipeline: psycopg.Pipeline, jobs: list[Job]) -> list[Asked]:
    """Send what the writes of a batch ask for first, all in one round trip; return each one's answers.

    They are answered before any of the batch has written. So one that shares a lock with an earlier one asks by itself, and
    so do all after one that names no lock, which may write anywhere.
    """
    out: list[Asked] = []
    held: set[str] = set()
    anywhere = False
    for job in jobs:
        own: Asked = {}
        if not anywhere and held.isdisjoint(job.locks):
            for sql, params in job.ahead:
                own[sql, tuple(params)] = conn.execute(in_postgres(sql)[0], params)
        out.append(own)
        held.update(job.locks)
        anywhere = anywhere or not job.locks
    if any(out):
        pipeline.sync()
    return out


def _one(
    conn: psycopg.Connection[Any], pipeline: psycopg.Pipeline, job: Job, asked: Asked
) -> tuple[Outcome, list[str]]:
    """Run one write. Raises what it raised if the transaction cannot simply go on without it."""
    tx = PostgresTx(conn, pipeline, writes=True, asked=asked)
    try:
        value = job.fn(tx)
    except BaseException as exc:
        if isinstance(exc, psycopg.Error) or tx.changed:
            raise
        return Outcome(job, error=exc), []
    return Outcome(job, value=value, committed=tx.committed), tx.notices


def _read_in(session: Session, fn: Callable[[Tx], T]) -> T:
    conn = session.conn
    try:
        with conn.pipeline() as pipeline:
            conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            value = fn(PostgresTx(conn, pipeline, writes=False))
            conn.execute("COMMIT")
    except BaseException as exc:
        if not session.lost(exc):
            with contextlib.suppress(psycopg.Error):
                conn.execute("ROLLBACK")
        raise
    return value
