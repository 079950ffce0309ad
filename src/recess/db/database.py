"""One SQLite file: a writer thread with group commit, a few readers, typed errors. It must know no table of any room.

Why one writer: SQLite has one write lock anyway, and a queue in front of it lets the writes that wait while one fsync
runs share the next one. Each write runs in its own savepoint, so that one's failure does not hurt its neighbours.

Crash safety: WAL with synchronous=FULL; a write's future is resolved only after COMMIT returned, that is after the fsync
of the log that holds it. A *relaxed* write (`durable=False`) is committed without an fsync of its own: it survives the
death of the process, not of the host, and is made durable by the next durable write, because the WAL is synced in order.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from recess.db.errors import UniqueViolation, primary_code, translate
from recess.db.migrations import RoomSchema, migrate
from recess.errors import Unavailable

T = TypeVar("T")

BATCH_MAX = 256  # writes that share one commit: bounds how long the first of them waits
BUSY_TIMEOUT_S = 5.0  # a foreign program (a backup, the sqlite3 shell) may hold the file for a moment
CACHE_KIB = 8192


class Row(Protocol):
    """One row: values by column name or number."""

    def __getitem__(self, key: str | int, /) -> Any:
        """Return the value of a column."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yield the values in column order."""
        ...

    def keys(self) -> list[str]:
        """Return the column names in order."""
        ...


class Tx:
    """A transaction as rooms see it: SQL with `?` parameters in, all rows out. Valid only inside its function."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self.committed: list[Callable[[], None]] = []

    def execute(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Run one statement and return its rows ([] for those that give none; use RETURNING to see what changed).

        Raises UniqueViolation, after which the transaction may go on; any other failure should end it.
        """
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

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call this on the caller's event loop once the write is durable, even if the caller was cancelled."""
        self.committed.append(callback)


@dataclass
class _Job:
    fn: Callable[[Tx], Any]
    durable: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


@dataclass
class _Outcome:
    job: _Job
    value: Any = None
    error: BaseException | None = None
    committed: list[Callable[[], None]] = field(default_factory=list)


class _BatchLost(Exception):
    """SQLite rolled the whole transaction back under us (disk full, I/O error): the other writes must run again."""


class Database:
    """A database that is open. Make it with `Database.open`; safe to use from several event loops."""

    def __init__(self, path: Path, writer: sqlite3.Connection, readers: int) -> None:
        self.path = path
        self._writer = writer
        self._full_sync = True
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # orders `write` against `close`: no job after the closing None
        self._closed = False
        self._local = threading.local()
        self._reader_conns: list[sqlite3.Connection] = []
        self._readers = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="recess-db-read")
        self._thread = threading.Thread(target=self._write_loop, name="recess-db-write", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, schemas: Sequence[RoomSchema], *, readers: int = 2) -> Database:
        """Open or make the file (mode 0600) and run what migrations are due. Blocking.

        Raises Incompatible (a newer version's file), Corrupt, OutOfSpace, Unavailable.
        """
        conn: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600, exist_ok=True)
            conn = _connect(path)
            conn.execute("PRAGMA journal_mode=WAL")
            conn.execute("PRAGMA synchronous=FULL")
            migrate(conn, schemas)
        except BaseException as exc:
            if conn is not None:
                conn.close()
            raise translate(exc, str(path)) from exc
        return cls(path, conn, readers)

    async def write(self, fn: Callable[[Tx], T], *, durable: bool = True) -> T:
        """Run `fn` in a transaction and return its value once that is durable.

        `fn` runs on the writer thread, must not block on anything else, and may run more than once (only the last run
        counts), so it must have no effect outside `tx`. An exception it raises undoes it alone. If the caller is
        cancelled before the writer gets to it, it does not run; later, it may have.
        """
        loop = asyncio.get_running_loop()
        job = _Job(fn, durable, loop, loop.create_future())
        with self._gate:
            if self._closed:
                raise Unavailable("the database is closed")
            self._jobs.put(job)
        value: T = await job.future
        return value

    async def read(self, fn: Callable[[Tx], T]) -> T:
        """Run `fn` in a read transaction of its own (one consistent view) and return its value. It cannot write."""
        if self._closed:
            raise Unavailable("the database is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, fn)

    async def close(self) -> None:
        """Finish what is queued, then close. May be called twice."""
        with self._gate:
            first, self._closed = not self._closed, True
            if first:
                self._jobs.put(None)
        if first:
            await asyncio.get_running_loop().run_in_executor(None, self._shut_down)

    def _shut_down(self) -> None:
        self._thread.join()
        self._readers.shutdown(wait=True)
        for conn in self._reader_conns:
            conn.close()
        self._writer.close()

    # --- reading

    def _read(self, fn: Callable[[Tx], T]) -> T:
        try:
            conn = self._reader()
            conn.execute("BEGIN")
            try:
                return fn(Tx(conn))
            finally:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
        except BaseException as exc:
            raise translate(exc, str(self.path)) from exc

    def _reader(self) -> sqlite3.Connection:
        conn: sqlite3.Connection | None = getattr(self._local, "conn", None)
        if conn is None:
            conn = _connect(self.path)
            conn.execute("PRAGMA query_only=1")
            self._local.conn = conn
            self._reader_conns.append(conn)
        return conn

    # --- writing, all on the writer thread

    def _write_loop(self) -> None:
        closing = False
        while not closing:
            first = self._jobs.get()
            if first is None:
                return
            batch = [first]
            while len(batch) < BATCH_MAX:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    closing = True
                    break
                batch.append(job)
            _deliver(self._run([job for job in batch if not job.future.cancelled()]))

    def _run(self, jobs: list[_Job]) -> list[_Outcome]:
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
            return [_Outcome(job, error=error) for job in jobs]

    def _attempt(self, jobs: list[_Job]) -> list[_Outcome]:
        conn = self._writer
        try:
            self._sync_mode(full=any(job.durable for job in jobs))
            conn.execute("BEGIN IMMEDIATE")
            outcomes = [self._savepoint(job) for job in jobs]
            conn.execute("COMMIT")
        except BaseException as exc:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise _BatchLost from (exc.__cause__ if isinstance(exc, _BatchLost) else exc)
        return outcomes

    def _savepoint(self, job: _Job) -> _Outcome:
        conn, tx = self._writer, Tx(self._writer)
        conn.execute("SAVEPOINT job")
        try:
            value = job.fn(tx)
        except BaseException as exc:
            if not conn.in_transaction:
                raise _BatchLost from exc
            conn.execute("ROLLBACK TO job")
            conn.execute("RELEASE job")
            return _Outcome(job, error=translate(exc, str(self.path)))
        conn.execute("RELEASE job")
        return _Outcome(job, value=value, committed=tx.committed)

    def _sync_mode(self, *, full: bool) -> None:
        if full != self._full_sync:
            self._writer.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
            self._full_sync = full


def _connect(path: Path) -> sqlite3.Connection:
    conn = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    conn.row_factory = sqlite3.Row
    conn.execute("PRAGMA foreign_keys=ON")
    conn.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    conn.execute("PRAGMA temp_store=MEMORY")
    return conn


def _deliver(outcomes: list[_Outcome]) -> None:
    """Hand the outcomes to their event loops, one wake-up a loop. A loop that is gone has nobody waiting."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome.job.loop, []).append(outcome)
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, mine)
        except RuntimeError:
            continue


def _resolve(outcomes: list[_Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error is None:
            for callback in outcome.committed:
                try:
                    callback()
                except Exception as exc:  # the write stands, and this batch's other callers wait for theirs
                    outcome.job.loop.call_exception_handler(
                        {"message": "recess: an after-commit callback failed", "exception": exc}
                    )
        future = outcome.job.future
        if future.done():
            continue
        if outcome.error is None:
            future.set_result(outcome.value)
        elif isinstance(outcome.error, StopIteration):  # a future refuses it: it would end a generator silently
            future.set_exception(RuntimeError("a database function raised StopIteration"))
        else:
            future.set_exception(outcome.error)
