"""Forward-only, numbered migrations, one list a room; which are due is a pure function, applying them is the effect.

Each is one transaction, recorded with the hash of its text: a crash leaves whole migrations or none, and a text that was
edited after it ran is noticed. A room keeps its list in its `migrations` package and hands it to `Database.open`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from recess.errors import Incompatible

_TABLE = (
    "CREATE TABLE IF NOT EXISTS recess_migration "
    "(room TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL, PRIMARY KEY (room, number))"
)


@dataclass(frozen=True)
class Migration:
    """One step of a room's schema: `number` counts from 1 without gaps; each statement is one SQL statement."""

    number: int
    name: str
    statements: tuple[str, ...]

    @property
    def hash(self) -> str:
        """BLAKE3-256 hex of the statements."""
        return blake3("\x00".join(self.statements).encode()).hexdigest()


@dataclass(frozen=True)
class RoomSchema:
    """All migrations of one room, in order."""

    room: str
    migrations: tuple[Migration, ...]


def due(schema: RoomSchema, applied: Mapping[int, str]) -> list[Migration]:
    """Return the migrations still to run, given number -> hash of those that ran.

    Raises Incompatible for a database of a newer version, or one whose applied text differs from ours.
    """
    known = {m.number: m for m in schema.migrations}
    if sorted(known) != list(range(1, len(known) + 1)):
        raise ValueError(f"migrations of {schema.room} are not numbered 1..{len(known)}")
    newer = sorted(set(applied) - set(known))
    if newer:
        raise Incompatible(
            f"the database was written by a newer version of recess ({schema.room} schema {newer[-1]}, "
            f"this version knows {len(known)})",
            hint="upgrade recess, or use another RECESS_HOME",
            reasons=[f"{schema.room}: schema {newer[-1]} > {len(known)}"],
        )
    for number, digest in applied.items():
        if known[number].hash != digest:
            raise Incompatible(
                f"the database's {schema.room} schema {number} ({known[number].name}) differs from this version's",
                hint="it was written by a development version: use another RECESS_HOME",
                reasons=[f"{schema.room}: schema {number} has another hash"],
            )
    return [m for m in schema.migrations if m.number not in applied]


def migrate(conn: sqlite3.Connection, schemas: Sequence[RoomSchema]) -> int:
    """Bring the database up to date and return how many migrations ran.

    What is due is read again inside each transaction, so two processes that start together do not run one twice.
    """
    conn.execute(_TABLE)
    ran = 0
    for schema in schemas:
        while True:
            conn.execute("BEGIN IMMEDIATE")
            try:
                rows = conn.execute("SELECT number, hash FROM recess_migration WHERE room = ?", (schema.room,))
                todo = due(schema, {int(number): str(digest) for number, digest in rows.fetchall()})
                if todo:
                    _apply(conn, schema.room, todo[0])
                conn.execute("COMMIT")
            except BaseException:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
                raise
            if not todo:
                break
            ran += 1
    return ran


def _apply(conn: sqlite3.Connection, room: str, migration: Migration) -> None:
    for statement in migration.statements:
        conn.execute(statement)
    conn.execute(
        "INSERT INTO recess_migration (room, number, name, hash) VALUES (?, ?, ?, ?)",
        (room, migration.number, migration.name, migration.hash),
    )
