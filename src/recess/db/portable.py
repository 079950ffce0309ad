"""All rows of a database as lines of JSON, the same for both engines: what a backup is made of. It must know no table of a
room, only which tables are a room's: they begin with its word.

A line is one row: a JSON list of the values in the order of the columns, bytes as `{"bytes": "<base64>"}`. Rows come in the order of
the table's primary key, a page at a time, all of one transaction.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from recess.db.contract import SQLITE, Row, Tx
from recess.db.database import Database
from recess.errors import Conflict, Corrupt

PAGE_ROWS = 500
MIGRATIONS = "recess_migration"

_decode = msgspec.json.Decoder(list[Any]).decode


@dataclass(frozen=True)
class TableShape:
    """A table: its columns in order, those of its primary key in theirs, and the one that numbers itself ("": none)."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    numbered: str


def shapes(tx: Tx, prefixes: Sequence[str]) -> list[TableShape]:
    """Return the tables whose names begin with any of these words, by name."""
    if tx.dialect == SQLITE:
        rows = tx.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        shape = _sqlite_shape
    else:
        rows = tx.execute("SELECT tablename AS name FROM pg_tables WHERE schemaname = current_schema() ORDER BY 1")
        shape = _postgres_shape
    names = [str(row["name"]) for row in rows]
    return [shape(tx, name) for name in names if name.startswith(tuple(prefixes))]


def _sqlite_shape(tx: Tx, name: str) -> TableShape:
    info = tx.execute(f"SELECT name, type, pk FROM pragma_table_info('{name}')")
    key = tuple(str(row["name"]) for row in sorted((r for r in info if r["pk"]), key=lambda row: int(row["pk"])))
    numbered = next((str(r["name"]) for r in info if r["pk"] and len(key) == 1 and r["type"] == "INTEGER"), "")
    return TableShape(name, tuple(str(row["name"]) for row in info), key, numbered)


def _postgres_shape(tx: Tx, name: str) -> TableShape:
    info = tx.execute(
        "SELECT column_name AS name, is_identity FROM information_schema.columns "
        "WHERE table_schema = current_schema() AND table_name = ? ORDER BY ordinal_position",
        (name,),
    )
    key = tx.execute(
        "SELECT k.column_name AS name FROM information_schema.table_constraints c "
        "JOIN information_schema.key_column_usage k ON k.constraint_name = c.constraint_name "
        "AND k.table_schema = c.table_schema AND k.table_name = c.table_name "
        "WHERE c.table_schema = current_schema() AND c.table_name = ? AND c.constraint_type = 'PRIMARY KEY' "
        "ORDER BY k.ordinal_position",
        (name,),
    )
    numbered = next((str(row["name"]) for row in info if row["is_identity"] == "YES"), "")
    return TableShape(name, tuple(str(r["name"]) for r in info), tuple(str(r["name"]) for r in key), numbered)


def lines_of(tx: Tx, table: TableShape) -> Iterator[bytes]:
    """Yield a table's rows as lines."""
    columns, key = ", ".join(table.columns), ", ".join(table.key)
    after: tuple[object, ...] = ()
    while True:
        where = f"WHERE ({key}) > ({', '.join('?' * len(after))}) " if after else ""
        rows = tx.execute(f"SELECT {columns} FROM {table.name} {where}ORDER BY {key} LIMIT ?", (*after, PAGE_ROWS))
        for row in rows:
            yield encode_line(row)
        if len(rows) < PAGE_ROWS:
            return
        after = tuple(rows[-1][name] for name in table.key)


def encode_line(row: Row) -> bytes:
    """Return a row as a line."""
    values = [{"bytes": base64.b64encode(v).decode()} if isinstance(v, bytes | memoryview) else v for v in row]
    return msgspec.json.encode(values) + b"\n"


def decode_line(line: bytes, width: int, table: str) -> list[object]:
    """Return the values of a line. Raises Corrupt."""
    try:
        values = _decode(line)
        if len(values) != width:
            raise ValueError(f"{len(values)} values, not {width}")
        return [base64.b64decode(v["bytes"], validate=True) if isinstance(v, dict) else v for v in values]
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as exc:
        raise Corrupt(f"backup: a line of {table} cannot be read: {exc}") from exc


Tables = Iterable[tuple[str, Sequence[str], Iterable[bytes]]]  # name, columns, lines


def versions(tx: Tx) -> dict[str, int]:
    """Return room -> number of its newest migration that ran."""
    rows = tx.execute(f"SELECT room, max(number) AS number FROM {MIGRATIONS} GROUP BY room ORDER BY room")
    return {str(row["room"]): int(row["number"]) for row in rows}


def check_empty(tx: Tx, prefixes: Sequence[str], but: Sequence[str]) -> None:
    """Raise Conflict if any table has a row, but these."""
    for shape in shapes(tx, prefixes):
        if shape.name not in but and tx.one(f"SELECT 1 AS found FROM {shape.name} LIMIT 1") is not None:
            raise Conflict(f"the database has rows already (in {shape.name})", hint="restore into an empty one")


def drop_all(tx: Tx, prefixes: Sequence[str]) -> None:
    """Remove every table with its rows, and the record of the migrations."""
    for shape in (*shapes(tx, prefixes), *shapes(tx, [MIGRATIONS])):
        tx.execute(f"DROP TABLE {shape.name}")


async def load(
    db: Database, open_tables: Callable[[], Tables], prefixes: Sequence[str], *, replaced: Sequence[str] = ()
) -> dict[str, int]:
    """Put the rows of a backup into a database that has the very same tables, all empty but those to be `replaced`, in one
    transaction; return how many of each. `open_tables` may be called several times. Raises Conflict if there are rows,
    Corrupt for lines that do not fit."""

    def run(tx: Tx) -> dict[str, int]:
        check_empty(tx, prefixes, replaced)
        for name in replaced:
            tx.execute(f"DELETE FROM {name}")
        known = {shape.name: shape for shape in shapes(tx, prefixes)}
        counts: dict[str, int] = {}
        for name, columns, lines in open_tables():
            shape = known.get(name)
            if shape is None or set(columns) != set(shape.columns):
                raise Corrupt(f"backup: {name} is not a table of that version, or has other columns")
            counts[name] = _fill(tx, shape, columns, lines)
        return counts

    return await db.write(run)


def _fill(tx: Tx, shape: TableShape, columns: Sequence[str], lines: Iterable[bytes]) -> int:
    sql = f"INSERT INTO {shape.name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    count = 0
    for line in lines:
        tx.execute(sql, decode_line(line, len(columns), shape.name))
        count += 1
        if count % PAGE_ROWS == 0:
            tx.one("SELECT 1 AS x")  # what was sent together is done before more is
    if shape.numbered and count and tx.dialect != SQLITE:
        tx.execute(
            f"SELECT setval(pg_get_serial_sequence('{shape.name}', '{shape.numbered}'), "
            f"(SELECT max({shape.numbered}) FROM {shape.name}))"
        )
    return count
