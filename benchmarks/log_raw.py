"""The bare alternative to the context log: the same rows, by the engine alone, one connection, nothing checked."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from recess.contextlog import SCHEMA
from recess.db import Database

BODY = {"text": "x" * 600, "tool_calls": [], "part": 0}
DIGEST = b"0" * 16
_SESSION = (
    "INSERT INTO log_session (id, name, agent, code_version, state, head, consumed, epoch, owner, lease_until, parent, "
    "fork_position, snapshot, snapshot_position, turn, attempts, created, labels, meta, lineage) "
    "VALUES ('ses_1', '', 'a', 'v', 'cold', 0, 0, 1, 'n', 1e12, '', 0, '', 0, 0, 0, 0, '{}', '{}', '[]')"
)
_ENTRY = (
    "INSERT INTO log_entry (session, position, kind, turn, ref, key, epoch, code_version, ts, schema, mark, size, blob, body) "
    "VALUES ('ses_1', ?, 'note', 1, '', ?, 1, 'v', ?, 1, NULL, ?, '', ?)"
)
_KEY = "INSERT INTO log_key (session, key, position, digest) VALUES ('ses_1', ?, ?, ?)"
_HEAD = "UPDATE log_session SET head = ? WHERE id = 'ses_1'"

Append = Callable[[int], None]


def fresh(path: Path) -> Path:
    """Return the path of a SQLite file that is not there (any more)."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return path


def _statements(execute: Callable[[str, tuple[Any, ...]], object], body: str) -> Append:
    def append(n: int) -> None:
        execute(_ENTRY, (n, f"k{n}", time.time(), len(body), body))
        execute(_KEY, (f"k{n}", n, DIGEST))
        execute(_HEAD, (n,))

    return append


@contextmanager
def sqlite(path: Path) -> Iterator[Append]:
    """WAL, synchronous=FULL, one transaction an append."""
    db = sqlite3.connect(fresh(path), isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    for migration in SCHEMA.migrations:
        for statement in migration.statements:
            db.execute(statement)
    db.execute(_SESSION)
    rows = _statements(db.execute, json.dumps(BODY))

    def append(n: int) -> None:
        db.execute("BEGIN IMMEDIATE")
        rows(n)
        db.execute("COMMIT")

    yield append
    db.close()


@contextmanager
def postgres(url: str, *, pipeline: bool = False) -> Iterator[Append]:
    """synchronous_commit=on, prepared statements, one transaction an append: statement by statement, as most programs do, or
    with `pipeline` all of them in one round trip, which is the quickest there is."""
    with psycopg.connect(url, autocommit=True, cursor_factory=psycopg.RawCursor) as conn:
        numbered = {sql: _dollars(sql) for sql in (_ENTRY, _KEY, _HEAD)}
        conn.execute(_SESSION.encode())
        rows = _statements(lambda sql, values: conn.execute(numbered[sql], values), json.dumps(BODY))

        def append(n: int) -> None:
            conn.execute("BEGIN")
            rows(n)
            conn.execute("COMMIT")

        def pipelined(n: int) -> None:
            with conn.pipeline():
                append(n)

        yield pipelined if pipeline else append


def _dollars(sql: str) -> bytes:
    parts = sql.split("?")
    return ("".join(f"{part}${n}" for n, part in enumerate(parts[:-1], 1)) + parts[-1]).encode()


async def with_tables(url: str) -> str:
    """Make the log's tables in an empty Postgres and return its address."""
    await Database.open(url, [SCHEMA]).close()
    return url
