import sqlite3

import pytest

from recess.catalog import SCHEMA as CATALOG
from recess.contextlog import SCHEMA as LOG
from recess.db import POSTGRES, Database, Migration, RoomSchema
from recess.db.migrations import due, migrate
from recess.errors import Incompatible

ONE = Migration(1, "one", ("CREATE TABLE a (x INTEGER)",))
TWO = Migration(2, "two", ("ALTER TABLE a ADD COLUMN y INTEGER", "CREATE TABLE b (x INTEGER)"))
BOTH = RoomSchema("t", (ONE, TWO))


def test_due_is_what_has_not_run():
    assert due(BOTH, {}) == [ONE, TWO]
    assert due(BOTH, {1: ONE.hash}) == [TWO]
    assert due(BOTH, {1: ONE.hash, 2: TWO.hash}) == []


def test_a_newer_database_is_refused_with_reasons():
    with pytest.raises(Incompatible, match="newer version") as caught:
        due(RoomSchema("t", (ONE,)), {1: ONE.hash, 2: TWO.hash})
    assert caught.value.details["reasons"] == ["t: schema 2 > 1"]


def test_an_edited_migration_is_refused():
    with pytest.raises(Incompatible, match="differs"):
        due(BOTH, {1: "0" * 64})


def test_numbers_have_no_gaps():
    with pytest.raises(ValueError, match=r"1\.\.1"):
        due(RoomSchema("t", (TWO,)), {})


async def test_upgrade_keeps_the_rows_and_a_downgrade_is_refused(tmp_path):
    old = Database.open(tmp_path / "x.db", [RoomSchema("t", (ONE,))])
    await old.write(lambda tx: tx.execute("INSERT INTO a (x) VALUES (7)"))
    await old.close()
    new = Database.open(tmp_path / "x.db", [BOTH])
    assert [tuple(r) for r in await new.read(lambda tx: tx.execute("SELECT x, y FROM a"))] == [(7, None)]
    await new.close()
    with pytest.raises(Incompatible):
        Database.open(tmp_path / "x.db", [RoomSchema("t", (ONE,))])


def test_a_migration_that_fails_leaves_nothing_of_itself(tmp_path):
    broken = RoomSchema("t", (ONE, Migration(2, "two", ("CREATE TABLE c (x INTEGER)", "CREATE TABLE a (x INTEGER)"))))
    conn = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        migrate(conn, [broken])
    tables = {name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"recess_migration", "a"}
    assert migrate(conn, [BOTH]) == 1
    assert migrate(conn, [BOTH]) == 0
    conn.close()


def test_published_migrations_are_never_edited():
    """These hashes are in users' databases. A test that fails here asks for a new migration, not for a new hash."""
    assert {
        (s.room, m.number): (m.hash[:16], m.hash_in(POSTGRES)[:16]) for s in (LOG, CATALOG) for m in s.migrations
    } == {
        ("contextlog", 1): ("1b8fdee2fef29cb7", "a5f55bee72eeb471"),
        ("contextlog", 2): ("b14e4d484fbbdd40", "0d6d6f8b6c3eedeb"),
        ("contextlog", 3): ("437f9003e2d726b6", "7a67708d8bddca8f"),
        ("contextlog", 4): ("29719f27df4e7692", "86945fcbfa6914f0"),
        ("catalog", 1): ("cf2a681a2039c936", "eb49b522af478ee9"),
        ("catalog", 2): ("c637419a8db8bde8", "b0638a908078989c"),
        ("catalog", 3): ("87ee33c21a61c52c", "029361864c0b97ab"),
        ("catalog", 4): ("7e74511cb19eafec", "509f874239ae9c54"),
    }
