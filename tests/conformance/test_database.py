"""What a `Database` promises, on both engines."""

import asyncio
import threading

import pytest

from recess.db import Database, Migration, RoomSchema, UniqueViolation
from recess.errors import Conflict, Incompatible, NotFound, Unavailable

FIRST = Migration(
    1, "first", ("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT NOT NULL)", "CREATE UNIQUE INDEX t_v ON t (v)")
)
SCHEMA = RoomSchema("t", (FIRST,))


@pytest.fixture(params=["sqlite", "postgres"])
def where(request, tmp_path):
    return tmp_path / "x.db" if request.param == "sqlite" else request.getfixturevalue("postgres").database()


@pytest.fixture
async def db(where):
    database = Database.open(where, [SCHEMA])
    yield database
    await database.close()


def put(key, value=None):
    return lambda tx: tx.execute("INSERT INTO t (id, v) VALUES (?, ?) RETURNING id", (key, value or f"v{key}"))[0]["id"]


def quiet_put(key, value=None):
    return lambda tx: tx.execute("INSERT INTO t (id, v) VALUES (?, ?)", (key, value or f"v{key}"))


def ids(tx):
    return [row["id"] for row in tx.execute("SELECT id FROM t ORDER BY id")]


class Gate:
    """Holds the writer thread inside a write until it is opened, so that others queue up behind it."""

    def __init__(self):
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, tx):
        self.entered.set()
        assert self.open.wait(60)


async def together(db, *fns):
    """Run writes in one batch and return what became of each."""
    gate = Gate()
    first = asyncio.ensure_future(db.write(gate))
    await asyncio.to_thread(gate.entered.wait, 60)
    jobs = [asyncio.ensure_future(db.write(fn)) for fn in fns]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    return await asyncio.gather(*jobs, return_exceptions=True)


async def test_rows_have_names_and_numbers(db):
    await db.write(put(7, "seven"))
    (row,) = await db.read(lambda tx: tx.execute("SELECT id, v FROM t"))
    assert (row["id"], row[1], list(row), list(row.keys())) == (7, "seven", [7, "seven"], ["id", "v"])
    assert await db.read(lambda tx: tx.one("SELECT id FROM t WHERE id = ?", (8,))) is None


async def test_what_was_written_is_there_after_reopening(db, where):
    assert await db.write(put(1)) == 1
    await db.close()
    again = Database.open(where, [SCHEMA])
    assert await again.read(ids) == [1]
    await again.close()


@pytest.mark.parametrize("store", [put, quiet_put])
async def test_one_failing_write_does_not_hurt_its_neighbours(db, store):
    def fail(tx):
        tx.execute("INSERT INTO t (id, v) VALUES (50, 'gone')")
        raise NotFound("mine")

    def look(tx):
        if ids(tx):
            raise NotFound("before it changed anything")

    results = await together(db, store(1), fail, store(2), store(1), look, store(3))
    assert [type(result) for result in results if isinstance(result, Exception)] == [NotFound, Conflict, NotFound]
    assert await db.read(ids) == [1, 2, 3]


async def test_an_attempt_may_fail_and_the_transaction_goes_on(db):
    def run(tx):
        tx.execute("INSERT INTO t (id, v) VALUES (1, 'a')")
        with pytest.raises(UniqueViolation):
            tx.attempt("INSERT INTO t (id, v) VALUES (2, 'a')")
        with pytest.raises(UniqueViolation):
            tx.attempt("INSERT INTO t (id, v) VALUES (1, 'x') RETURNING id")
        assert [row["v"] for row in tx.attempt("INSERT INTO t (id, v) VALUES (3, 'c') RETURNING v")] == ["c"]
        tx.attempt("INSERT INTO t (id, v) VALUES (4, 'd')")
        return ids(tx)

    assert await db.write(run) == [1, 3, 4]
    assert await db.read(ids) == [1, 3, 4]


async def test_a_write_sees_what_the_one_before_it_in_the_same_commit_did(db):
    results = await together(db, quiet_put(1), ids, quiet_put(2), ids)
    assert (results[1], results[3]) == ([1], [1, 2])


async def test_a_read_cannot_write_and_sees_one_moment(db):
    with pytest.raises(Exception, match=r"(?i)read-?only"):
        await db.read(put(1))
    assert await db.read(ids) == []

    loop = asyncio.get_running_loop()

    def look(tx):
        before = ids(tx)
        asyncio.run_coroutine_threadsafe(db.write(put(1)), loop).result(60)
        return before, ids(tx)

    assert await db.read(look) == ([], [])
    assert await db.read(ids) == [1]


async def test_callbacks_come_after_the_commit_and_only_of_writes_that_stand(db):
    called = []

    def good(tx):
        put(1)(tx)
        tx.after_commit(lambda: called.append("good"))

    def bad(tx):
        tx.after_commit(lambda: called.append("bad"))
        put(1)(tx)

    results = await together(db, good, bad)
    assert called == ["good"]
    assert isinstance(results[1], Conflict)


async def test_relaxed_writes_are_there_at_once(db):
    await db.write(put(1), durable=False)
    assert await db.read(ids) == [1]


async def test_locks_order_writes_of_two_nodes(where):
    """Each reads, then writes what it read plus one: under one lock nothing is lost, whichever node it is."""
    nodes = [Database.open(where, [SCHEMA]) for _ in range(2)]
    await nodes[0].write(put(1, "0"))

    def count_up(tx):
        value = int(tx.one("SELECT v FROM t WHERE id = 1")["v"])
        tx.execute("UPDATE t SET v = ? WHERE id = 1", (str(value + 1),))

    await asyncio.gather(*(node.write(count_up, locks=("x", f"other{i % 3}")) for i in range(25) for node in nodes))
    assert await nodes[0].read(lambda tx: tx.one("SELECT v FROM t")["v"]) == "50"
    await asyncio.gather(*(node.close() for node in nodes))


async def test_nodes_that_start_together_migrate_once(where):
    more = RoomSchema("t", (FIRST, Migration(2, "second", ("CREATE TABLE u (x REAL, y BLOB)",))))
    nodes = await asyncio.gather(*(asyncio.to_thread(Database.open, where, [more]) for _ in range(4)))
    for node in nodes:
        await node.write(lambda tx: tx.execute("INSERT INTO u (x, y) VALUES (?, ?)", (0.5, b"\x00\xff")))
    rows = await nodes[0].read(lambda tx: tx.execute("SELECT x, y FROM u"))
    assert [(row["x"], bytes(row["y"])) for row in rows] == [(0.5, b"\x00\xff")] * 4
    await asyncio.gather(*(node.close() for node in nodes))
    with pytest.raises(Incompatible, match="newer"):
        Database.open(where, [SCHEMA])


async def test_a_migration_that_fails_leaves_nothing_of_itself(where):
    broken = RoomSchema("t", (FIRST, Migration(2, "x", ("CREATE TABLE c (x INTEGER)", "CREATE TABLE t (x INTEGER)"))))
    with pytest.raises(Unavailable, match="already exists"):
        Database.open(where, [broken])
    good = Database.open(where, [RoomSchema("t", (FIRST, Migration(2, "x", ("CREATE TABLE c (x INTEGER)",))))])
    await good.close()


async def test_closing_waits_for_what_is_queued_and_refuses_what_comes_after(db):
    jobs = [asyncio.ensure_future(db.write(put(i))) for i in range(1, 5)]
    await asyncio.sleep(0)
    await db.close()
    assert await asyncio.gather(*jobs) == [1, 2, 3, 4]
    with pytest.raises(Unavailable):
        await db.write(put(9))
    with pytest.raises(Unavailable):
        await db.read(ids)
    await db.close()


async def test_what_is_asked_ahead_is_as_true_as_what_is_asked(db):
    """Writes of one batch that share a lock see each other, whatever was asked for ahead; so does one after a write without."""
    query = ("SELECT count(*) AS n FROM t WHERE id < ?", (100,))

    def count_and_put(key):
        def run(tx):
            before = tx.execute(*query)[0]["n"]
            quiet_put(key)(tx)
            return before, tx.execute(*query)[0]["n"]

        return run

    gate = Gate()
    first = asyncio.ensure_future(db.write(gate, locks=("gate",)))
    await asyncio.to_thread(gate.entered.wait, 60)
    jobs = [
        asyncio.ensure_future(db.write(count_and_put(1), locks=("x",), ahead=[query])),
        asyncio.ensure_future(db.write(count_and_put(2), locks=("x",), ahead=[query])),
        asyncio.ensure_future(db.write(count_and_put(3), locks=())),
        asyncio.ensure_future(db.write(count_and_put(4), locks=("y",), ahead=[query])),
        asyncio.ensure_future(db.write(count_and_put(5), locks=("y",), ahead=[query, ("SELECT 1 AS x", ())])),
    ]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    assert await asyncio.gather(*jobs) == [(n, n + 1) for n in range(5)]
