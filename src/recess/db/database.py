"""A database that is open, whatever its engine: a writer thread with group commit, a few readers. It must know no table.

Why one writer a node: a queue in front of it lets the writes that wait while one fsync runs share the next one. Each write
is undone alone if it fails. What is done with a batch is the engine's business (`sqlite`, `postgres`); this module holds
what they have in common: the queue, the way of an outcome back to its caller's event loop, the readers' threads.

Crash safety: a write's future is resolved only after its commit is durable. A *relaxed* write (`durable=False`) is
committed without an fsync of its own: it survives the death of this process, not of the database's host, and is made
durable by the next durable write.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from recess.db.contract import Query, Tx
from recess.db.migrations import RoomSchema
from recess.errors import Unavailable

T = TypeVar("T")

BATCH_MAX = 256  # writes that share one commit: bounds how long the first of them waits
SHARED = ("",)  # the lock of every write that names none


@dataclass
class Job:
    """One write that waits for its turn."""

    fn: Callable[[Tx], Any]
    durable: bool
    locks: Sequence[str]
    ahead: Sequence[Query]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


@dataclass
class Outcome:
    """What became of a job."""

    job: Job
    value: Any = None
    error: BaseException | None = None
    committed: list[Callable[[], None]] = field(default_factory=list)


class Database(ABC):
    """A database that is open. Make it with `Database.open`; safe to use from several event loops."""

    dialect = ""
    name = ""  # for people: the file, or the address without its password

    def __init__(self, readers: int) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # orders `write` against `close`: no job after the closing None
        self._closed = False
        self._readers = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="recess-db-read")
        self._thread = threading.Thread(target=self._write_loop, name="recess-db-write", daemon=True)

    @staticmethod
    def open(where: Path | str, schemas: Sequence[RoomSchema], *, readers: int = 2) -> Database:
        """Open a SQLite file (made if missing, mode 0600) or the Postgres at a URL, and run what migrations are due.
        Blocking.

        Raises Incompatible (a newer version's database), Corrupt, OutOfSpace, Unavailable; BadInput for no address.
        """
        if isinstance(where, str):
            # Here, not above: who has no Postgres need not have its client, nor wait for its import.
            from recess.db.postgres import PostgresDatabase

            return PostgresDatabase.connect(where, schemas, readers=readers)
        from recess.db.sqlite import SqliteDatabase

        return SqliteDatabase.open_file(where, schemas, readers=readers)

    async def write(
        self,
        fn: Callable[[Tx], T],
        *,
        durable: bool = True,
        locks: Sequence[str] = SHARED,
        ahead: Sequence[Query] = (),
    ) -> T:
        """Run `fn` in a transaction and return its value once that is durable.

        `fn` runs on the writer thread, must not block on anything else, and may run more than once (only the last run
        counts), so it must have no effect outside `tx`. An exception it raises undoes it alone. If the caller is
        cancelled before the writer gets to it, it does not run; later, it may have.

        `locks` names what this write must have for itself among all nodes: two writes that name the same word come one
        after the other, and the second sees what the first did. (A session's id; by default all share one word.)

        `ahead` are queries that `fn` will begin with, of rows that nobody changes without one of these locks: a hint, by which an
        engine on the other side of a socket may ask for many writes at once. `fn` asks as if there were none.
        """
        loop = asyncio.get_running_loop()
        job = Job(fn, durable, locks, ahead, loop, loop.create_future())
        with self._gate:
            if self._closed:
                raise Unavailable("the database is closed")
            self._jobs.put(job)
        value: T = await job.future
        return value

    async def read(self, fn: Callable[[Tx], T]) -> T:
        """Run `fn` in a read transaction of its own (one consistent view) and return its value. It cannot write, and may
        run more than once."""
        if self._closed:
            raise Unavailable("the database is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, fn)

    @abstractmethod
    def listen(self, heard: Callable[[str], None]) -> None:
        """Call `heard` with each word that another node sent by `Tx.notify`, and with "" when some may have been missed. From
        a thread of the database's own. Words are a hint, not a promise: a node that dies may not have sent its last.

        An engine that has no other nodes never calls."""

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
        self._disconnect()

    # --- what an engine does; `_run` on the writer thread, `_read` on a reader's

    @abstractmethod
    def _run(self, jobs: list[Job]) -> list[Outcome]:
        """Run writes that wait, all in one commit if that can be; one outcome a job. Raises nothing."""

    @abstractmethod
    def _read(self, fn: Callable[[Tx], T]) -> T:
        """Run a read in a transaction of its own."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close every connection: nothing runs any more."""

    # --- the queue, on the writer thread

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


def _deliver(outcomes: list[Outcome]) -> None:
    """Hand the outcomes to their event loops, one wake-up a loop. A loop that is gone has nobody waiting."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome.job.loop, []).append(outcome)
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, mine)
        except RuntimeError:
            continue


def _resolve(outcomes: list[Outcome]) -> None:
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
