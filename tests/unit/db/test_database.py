import asyncio
import sqlite3
import threading

import pytest

from recess.db import Database, Migration, RoomSchema
from recess.errors import Conflict, Corrupt, NotFound, OutOfSpace, Unavailable

SCHEMA = RoomSchema("t", (Migration(1, "first", ("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT NOT NULL)",)),))


@pytest.fixture
async def db(tmp_path):
    database = Database.open(tmp_path / "x.db", [SCHEMA])
    yield database
    await database.close()


def put(key, value="v"):
    return lambda tx: tx.execute("INSERT INTO t (id, v) VALUES (?, ?) RETURNING id", (key, value))[0]["id"]


def ids(tx):
    return [row["id"] for row in tx.execute("SELECT id FROM t ORDER BY id")]


class Gate:
    """Holds the writer thread inside a write until it is opened, so that others queue up behind it."""

    def __init__(self):
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, tx):
        self.entered.set()
        assert self.open.wait(10)


async def test_writes_are_read_back_and_survive_reopening(db, tmp_path):
    assert await db.write(put(1)) == 1
    assert await db.read(ids) == [1]
    await db.close()
    again = Database.open(tmp_path / "x.db", [SCHEMA])
    assert await again.read(ids) == [1]
    await again.close()
    assert (tmp_path / "x.db").stat().st_mode & 0o777 == 0o600


async def test_waiting_writes_share_one_commit(db):
    commits = []
    db._writer.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    gate = Gate()
    first = asyncio.ensure_future(db.write(gate))
    await asyncio.to_thread(gate.entered.wait, 10)
    others = [asyncio.ensure_future(db.write(put(i))) for i in range(1, 101)]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    assert await asyncio.gather(*others) == list(range(1, 101))
    assert len(commits) == 2


async def test_one_failing_write_does_not_hurt_its_neighbours(db):
    gate = Gate()
    first = asyncio.ensure_future(db.write(gate))
    await asyncio.to_thread(gate.entered.wait, 10)

    def fail(tx):
        tx.execute("INSERT INTO t (id, v) VALUES (50, 'gone')")
        raise NotFound("mine")

    jobs = [asyncio.ensure_future(db.write(fn)) for fn in (put(1), fail, put(2), put(1), put(3))]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert (results[0], results[2], results[4]) == (1, 2, 3)
    assert isinstance(results[1], NotFound)
    assert isinstance(results[3], Conflict)
    assert await db.read(ids) == [1, 2, 3]


async def test_a_full_disk_fails_only_what_does_not_fit(db):
    pages = await db.write(lambda tx: tx.one("PRAGMA page_count")[0])
    await db.write(lambda tx: tx.execute(f"PRAGMA max_page_count={pages + 4}"))
    gate = Gate()
    first = asyncio.ensure_future(db.write(gate))
    await asyncio.to_thread(gate.entered.wait, 10)
    jobs = [asyncio.ensure_future(db.write(fn)) for fn in (put(1), put(2, "x" * 200_000), put(3))]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert (results[0], results[2]) == (1, 3)
    assert isinstance(results[1], OutOfSpace)
    assert await db.read(ids) == [1, 3]


async def test_a_write_cancelled_in_the_queue_does_not_run(db):
    gate = Gate()
    first = asyncio.ensure_future(db.write(gate))
    await asyncio.to_thread(gate.entered.wait, 10)
    doomed = asyncio.ensure_future(db.write(put(1)))
    await asyncio.sleep(0)
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    gate.open.set()
    await first
    assert await db.write(put(2)) == 2
    assert await db.read(ids) == [2]


async def test_after_commit_runs_even_if_the_caller_is_cancelled(db):
    gate, called = Gate(), asyncio.Event()

    def run(tx):
        tx.after_commit(called.set)
        gate(tx)

    job = asyncio.ensure_future(db.write(run))
    await asyncio.to_thread(gate.entered.wait, 10)
    job.cancel()
    gate.open.set()
    await asyncio.wait_for(called.wait(), 10)


async def test_after_commit_does_not_run_for_a_failed_write(db):
    called = []

    def run(tx):
        tx.after_commit(lambda: called.append(1))
        raise NotFound("no")

    with pytest.raises(NotFound):
        await db.write(run)
    await db.write(put(1))
    assert called == []


async def test_a_callback_that_fails_holds_nobody_up(db):
    told, loop = [], asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: told.append(context["exception"]))

    def run(tx):
        tx.after_commit(lambda: [].pop())
        return "written"

    async with asyncio.timeout(5):
        assert await asyncio.gather(db.write(run), db.write(lambda tx: 2)) == ["written", 2]
    assert [type(one) for one in told] == [IndexError]


async def test_relaxed_writes_switch_the_sync_mode_and_back(db):
    def mode(tx):
        return tx.one("PRAGMA synchronous")[0]

    assert await db.write(mode, durable=False) == 1
    assert await db.write(mode) == 2


async def test_readers_cannot_write_and_see_one_moment(db):
    with pytest.raises(Unavailable):
        await db.read(put(1))
    await db.write(put(1))
    gate = Gate()

    def twice(tx):
        before = ids(tx)
        gate(tx)
        return before, ids(tx)

    reading = asyncio.ensure_future(db.read(twice))
    await asyncio.to_thread(gate.entered.wait, 10)
    await db.write(put(2))
    gate.open.set()
    assert await reading == ([1], [1])
    assert await db.read(ids) == [1, 2]


async def test_closing_finishes_what_is_queued(tmp_path):
    db = Database.open(tmp_path / "x.db", [SCHEMA])
    jobs = [asyncio.ensure_future(db.write(put(i))) for i in range(20)]
    await asyncio.sleep(0)
    await db.close()
    await db.close()
    assert await asyncio.gather(*jobs) == list(range(20))
    with pytest.raises(Unavailable):
        await db.write(put(99))
    with pytest.raises(Unavailable):
        await db.read(ids)
    with sqlite3.connect(tmp_path / "x.db") as conn:
        assert conn.execute("SELECT COUNT(*) FROM t").fetchone() == (20,)
    conn.close()


async def test_a_stop_iteration_is_an_error_and_not_a_hang(db):
    def run(tx):
        raise StopIteration

    with pytest.raises(RuntimeError):
        await db.write(run)


@pytest.mark.parametrize("content", [b"not a database at all" * 400, b"SQLite format 3\x00" + b"\xff" * 8000])
def test_a_file_that_is_no_database_is_corrupt(tmp_path, content):
    (tmp_path / "x.db").write_bytes(content)
    with pytest.raises(Corrupt) as caught:
        Database.open(tmp_path / "x.db", [SCHEMA])
    assert caught.value.hint
    assert (tmp_path / "x.db").read_bytes() == content


def test_a_folder_in_its_place_is_unavailable(tmp_path):
    (tmp_path / "x.db").mkdir()
    with pytest.raises(Unavailable):
        Database.open(tmp_path / "x.db", [SCHEMA])
