"""A Postgres that goes away: nothing acknowledged is lost, nothing is done twice, whoever cannot know is told so."""

import asyncio
import threading

import pytest

from recess.contextlog import SCHEMA, DirectoryBodies, Draft, MemoryBodies, SqlLog
from recess.db import Database, Migration, RoomSchema
from recess.db import postgres as engine
from recess.errors import BadInput, Fenced, Unavailable
from recess.testing.postgres_server import PostgresServer

TABLE = RoomSchema("t", (Migration(1, "first", ("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT NOT NULL)",)),))


@pytest.fixture
def where(postgres):
    return postgres.database()


@pytest.fixture
async def db(where):
    database = Database.open(where, [TABLE])
    yield database
    await database.close()


def put(key):
    return lambda tx: tx.execute("INSERT INTO t (id, v) VALUES (?, 'x')", (key,))


def ids(tx):
    return [row["id"] for row in tx.execute("SELECT id FROM t ORDER BY id")]


async def test_a_connection_that_was_cut_while_idle_costs_nothing(db, postgres, where):
    await db.write(put(1))
    assert await db.read(ids) == [1]
    assert postgres.cut(where) >= 2
    await db.write(put(2))
    assert await db.read(ids) == [1, 2]


async def test_a_connection_that_is_cut_inside_a_write_repeats_it(db, postgres, where):
    runs = []

    def run(tx):
        runs.append(ids(tx))
        put(1)(tx)
        if len(runs) == 1:
            postgres.cut(where)
        return ids(tx)

    assert await db.write(run) == [1]
    assert runs == [[], []]


class CutBeforeCommit:
    """The transaction's number, and the end of the connection when it was read: the commit is never sent."""

    def __init__(self, cursor, cut):
        self.cursor, self.cut = cursor, cut

    def fetchall(self):
        rows = self.cursor.fetchall()
        self.cut()
        return rows


async def test_a_commit_that_was_never_sent_is_repeated(db, postgres, where, monkeypatch):
    real, runs = db._begin, []

    def begin(conn, jobs):
        cursor = real(conn, jobs)
        return cursor if len(runs) else CutBeforeCommit(cursor, lambda: postgres.cut(where))

    monkeypatch.setattr(db, "_begin", begin)
    await db.write(lambda tx: (runs.append(1), put(1)(tx)))
    assert await db.read(ids) == [1]
    assert len(runs) == 2


async def test_a_commit_whose_answer_is_lost_is_asked_after(db, postgres, where, monkeypatch):
    """The connection breaks between the commit and its answer: the transaction's number tells what became of it."""
    real, runs = engine.payloads, []

    def cut(node, words):
        conn = db._writer.conn
        assert conn.execute("SELECT count(*) FROM t").fetchall()[0][0] == 1  # the answer after the commit's
        postgres.cut(where)
        return real(node, words)

    monkeypatch.setattr(engine, "payloads", cut)
    await db.write(lambda tx: (runs.append(1), put(1)(tx)))
    assert await db.read(ids) == [1]
    assert len(runs) == 1


async def test_a_server_that_is_down_refuses_and_is_used_again_when_it_is_back():
    with PostgresServer() as server:
        where = server.database()
        db = Database.open(where, [TABLE])
        heard, back = [], threading.Event()
        db.listen(lambda word: (heard.append(word), back.set()))
        await asyncio.to_thread(db._listener.ready.wait, 60)
        await db.write(put(1))
        server.stop()
        for call in (db.write(put(2)), db.read(ids)):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.details["retryable"] is True
        server.start()
        await db.write(put(3))
        assert await db.read(ids) == [1, 3]
        assert await asyncio.to_thread(back.wait, 60)  # who listens is told that it may have missed something
        assert heard == [""]
        await db.close()


async def test_words_reach_the_other_nodes_only_and_after_the_commit(where):
    one, two = (Database.open(where, [TABLE]) for _ in range(2))
    said = {"one": [], "two": []}
    last = threading.Event()

    def hear(name):
        def heard(word):
            said[name].append(word)
            if word == "last":
                last.set()

        return heard

    one.listen(hear("one"))
    two.listen(hear("two"))
    for node in (one, two):
        await asyncio.to_thread(node._listener.ready.wait, 60)

    def fail(tx):
        tx.notify("undone")
        raise Fenced("mine")

    with pytest.raises(Fenced):
        await one.write(fail)
    await one.write(lambda tx: [tx.notify(f"w{i}" * 50) for i in range(300)])
    await one.write(lambda tx: tx.notify("last"))
    assert await asyncio.to_thread(last.wait, 60)
    assert said["two"] == [*(f"w{i}" * 50 for i in range(300)), "last"]
    assert said["one"] == []
    await asyncio.gather(one.close(), two.close())


async def test_a_node_that_stands_still_inside_a_transaction_loses_it_and_holds_nobody_up(where, monkeypatch):
    monkeypatch.setitem(engine.open_session.__globals__["_SETTINGS"], "idle_in_transaction_session_timeout", "100ms")
    stuck, other = (Database.open(where, [SCHEMA]) for _ in range(2))
    logs = [SqlLog(db, MemoryBodies()) for db in (stuck, other)]
    row = await logs[0].create(agent="a", code_version="v")
    row = await logs[0].claim(row.id, "n1", 0.0, now=0.0)
    inside, taken = threading.Event(), threading.Event()
    runs = []

    def stand_still(tx):
        state = tx.one(f"SELECT epoch FROM log_session WHERE id = ?{tx.for_update}", (row.id,))
        runs.append(int(state["epoch"]))
        inside.set()
        assert taken.wait(60)
        if runs[-1] != row.epoch:
            raise Fenced("taken over")
        tx.execute("UPDATE log_session SET head = 99 WHERE id = ?", (row.id,))
        return tx.one("SELECT 1 AS x")

    slow = asyncio.ensure_future(stuck.write(stand_still, locks=(row.id,)))
    await asyncio.to_thread(inside.wait, 60)
    claimed = await logs[1].claim(
        row.id, "n2", 1e12, now=10.0
    )  # returns when the server has ended the other's transaction
    taken.set()
    with pytest.raises(Fenced):
        await slow
    assert runs == [1, 2]
    assert (claimed.owner, (await logs[1].get(row.id)).head) == ("n2", 0)
    await asyncio.gather(stuck.close(), other.close())


async def test_two_nodes_append_to_each_others_sessions_without_a_gap(where, tmp_path):
    """Inbox appends come from any node, crosswise and in batches: no deadlock, no gap, no double."""
    nodes = [Database.open(where, [SCHEMA]) for _ in range(2)]
    logs = [SqlLog(db, DirectoryBodies(tmp_path / "bodies")) for db in nodes]
    rows = [await logs[0].create(agent="a", code_version="v") for _ in range(3)]
    sent = [
        log.append_inbox(rows[(i + n) % 3].id, Draft("user", {"text": f"{n}/{i}"}, key=f"k{n}/{i}"))
        for i in range(30)
        for n, log in enumerate(logs)
    ]
    await asyncio.gather(*sent)
    for row in rows:
        entries = await logs[1].read(row.id)
        assert [e.position for e in entries] == list(range(1, 21))
        assert (await logs[0].get(row.id)).head == 20
    await asyncio.gather(*(db.close() for db in nodes))


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("nonsense", BadInput),
        ("postgresql://localhost:1/x", Unavailable),
        ("postgresql:///x?host=/nonexistent", Unavailable),
    ],
)
def test_an_address_that_leads_nowhere_is_told(address, error):
    with pytest.raises(error):
        Database.open(address, [TABLE])


def test_a_database_that_does_not_exist_is_told(postgres):
    with pytest.raises(BadInput, match="does not exist"):
        Database.open(postgres.address.replace("/postgres?", "/nowhere?"), [TABLE])
