"""One typed table: a frozen dataclass a row, JSON columns, found by id, name or unambiguous id prefix.

Functions that end in `_in` work inside the caller's transaction, so that rows of several tables (of other rooms too) can
change together. This module must know no particular table.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from recess.catalog.names import check_name
from recess.db import SQLITE, Database, Row, Tx, UniqueViolation
from recess.errors import BadInput, Conflict, Corrupt, NameInUse, NotFound

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

LIST_MAX = 10_000


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A row that cannot be read, as far as it can be told. `columns` holds every column as text, for whoever mends it;
    `error` is what reading it raises."""

    id: str
    error: Corrupt
    columns: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Table(Generic[R]):
    """A table's description. `record` has fields `id` and `name`; `json` names its JSON columns.

    `holds_name` is SQL that tells whether a row keeps others from its name. `tagged` allows names like "base:v1".
    """

    name: str
    record: type[R]
    what: str
    prefix: str
    json: frozenset[str] = frozenset()
    holds_name: str = "1 = 1"
    tagged: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names, which are the record's fields."""
        return tuple(f.name for f in dataclasses.fields(self.record))

    def insert_in(self, tx: Tx, row: R) -> R:
        """Add a row. Raises BadInput (illegal name), NameInUse, Conflict (the id exists)."""
        values = self._values(row)
        row_id, name = str(values["id"]), str(values["name"])
        self._check_form(name)
        marks = ", ".join("?" * len(values))
        try:
            tx.attempt(f"INSERT INTO {self.name} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))
        except UniqueViolation as exc:
            raise self._taken_in(tx, row_id, name, exc) from exc
        return row

    def find_in(self, tx: Tx, row_id: str) -> R | None:
        """Return the row of exactly this id, or None. Raises Corrupt."""
        row = tx.one(f"SELECT * FROM {self.name} WHERE id = ?", (row_id,))
        return None if row is None else self.decode(row)

    def get_in(self, tx: Tx, ref: str) -> R:
        """Return by id, name, or unambiguous id prefix (with or without its kind). Raises NotFound, BadInput, Corrupt."""
        exact = self.find_in(tx, ref)
        if exact is not None:
            return exact
        named = tx.one(
            f"SELECT * FROM {self.name} WHERE name = ? AND name <> '' ORDER BY ({self.holds_name}) DESC, created DESC",
            (ref,),
        )
        if named is not None:
            return self.decode(named)
        return self.decode(find_by_prefix(tx, self.name, self.what, self.prefix, ref))

    def list_in(self, tx: Tx, where: str = "1 = 1", params: Sequence[object] = (), *, limit: int = LIST_MAX) -> list[R]:
        """Return rows newest first; `where` is SQL of the caller's own, never a user's."""
        sql = f"SELECT * FROM {self.name} WHERE {where} ORDER BY created DESC, id DESC LIMIT ?"
        return [self.decode(row) for row in tx.execute(sql, (*params, limit))]

    def survey_in(
        self, tx: Tx, where: str = "1 = 1", params: Sequence[object] = (), *, limit: int | None = None
    ) -> tuple[list[R], list[Damaged]]:
        """Return the rows that can be read, newest first, and apart those that cannot: one never costs the others.

        Raises only what a database raises that is damaged or gone as a whole.
        """
        tail = f"FROM {self.name} WHERE {where} ORDER BY created DESC, id DESC" + (" LIMIT ?" if limit else "")
        values = (*params, limit) if limit else tuple(params)
        try:
            rows: Sequence[Row | Mapping[str, Any]] = tx.execute(f"SELECT * {tail}", values)
        except Exception:
            if tx.dialect != SQLITE:
                raise  # the others let in no text that is none
            # Text that is no UTF-8 fails the whole statement: once more as bytes, which tells which row it is.
            cells = ", ".join(f"typeof({c}) AS type_{c}, CASE typeof({c}) WHEN 'text' THEN CAST({c} AS BLOB) ELSE {c} END AS {c}"
                              for c in self.columns)  # fmt: skip
            rows = [_decoded_cells(row, self.columns) for row in tx.execute(f"SELECT {cells} {tail}", values)]
        good: list[R] = []
        damaged: list[Damaged] = []
        for row in rows:
            try:
                good.append(self.decode(row))
            except Corrupt as exc:
                texts = {name: _as_text(row[name]) for name in self.columns}
                damaged.append(Damaged(texts["id"], exc, texts))
        return good, damaged

    def locate_in(self, tx: Tx, ref: str) -> str:
        """Return the id of the row that `ref` means, as `get_in` finds it, without reading the row. Raises NotFound,
        BadInput."""
        for where in ("id = ?", f"name = ? AND name <> '' ORDER BY ({self.holds_name}) DESC, created DESC"):
            row = tx.one(f"SELECT id FROM {self.name} WHERE {where}", (ref,))
            if row is not None:
                return str(row["id"])
        return str(find_by_prefix(tx, self.name, self.what, self.prefix, ref, columns="id")["id"])

    def update_in(self, tx: Tx, row_id: str, **changes: object) -> R:
        """Change columns and return the row. Raises NotFound, NameInUse, BadInput for an unknown column."""
        unknown = sorted(set(changes) - set(self.columns) | ({"id"} & set(changes)))
        if unknown:
            raise BadInput(f"{self.what}: no such column: {unknown[0]}")
        if "name" in changes:
            self._check_form(str(changes["name"]))
        values = {name: _encode(value) if name in self.json else value for name, value in changes.items()}
        sets = ", ".join(f"{name} = ?" for name in values) or "id = id"
        run = tx.attempt if changes.keys() & {"name", "state"} else tx.execute  # what a unique index may refuse
        try:
            rows = run(
                f"UPDATE {self.name} SET {sets} WHERE id = ? RETURNING {', '.join(self.columns)}",
                (*values.values(), row_id),
            )
        except UniqueViolation as exc:
            old = tx.one(f"SELECT name FROM {self.name} WHERE id = ?", (row_id,))
            name = str(changes.get("name", old["name"] if old else ""))
            raise self._taken_in(tx, row_id, name, exc) from exc
        if not rows:
            raise _not_found(self.what, row_id)
        return self.decode(rows[0])

    def delete_in(self, tx: Tx, row_id: str) -> bool:
        """Remove a row; False if there was none."""
        return bool(tx.execute(f"DELETE FROM {self.name} WHERE id = ? RETURNING id", (row_id,)))

    def decode(self, row: Row | Mapping[str, Any]) -> R:
        """Return the record of a row. Raises Corrupt naming table, row and column."""
        values: dict[str, Any] = {name: row[name] for name in self.columns}
        try:
            for name in self.json:
                values[name] = msgspec.json.decode(values[name])
            return msgspec.convert(values, self.record)
        except (msgspec.MsgspecError, TypeError) as exc:
            raise Corrupt(
                f"catalog: {self.what} {_as_text(values['id'])!r} has an unreadable row: {exc}",
                hint="the database was changed by something else; remove the row or restore a backup",
                kind=self.what,
                ref=_as_text(values["id"]),
            ) from exc

    def _values(self, row: R) -> dict[str, object]:
        return {name: _encode(getattr(row, name)) if name in self.json else getattr(row, name) for name in self.columns}

    def _check_form(self, name: str) -> None:
        if name:
            check_name(name, self.what, tagged=self.tagged)

    def _taken_in(self, tx: Tx, row_id: str, name: str, exc: UniqueViolation) -> Conflict:
        """Say which of the unique columns it was."""
        holder = tx.one(
            f"SELECT id FROM {self.name} WHERE name = ? AND name <> '' AND id <> ? AND ({self.holds_name})",
            (name, row_id),
        )
        if holder is not None:
            return NameInUse(
                f"the name {name!r} is in use by {self.what} {holder['id']}",
                hint="choose another name, or remove that one first",
                kind=self.what,
                ref=str(holder["id"]),
            )
        why = "exists already" if self.find_in(tx, row_id) is not None else f"cannot be stored: {exc}"
        return Conflict(f"{self.what} {row_id} {why}", kind=self.what, ref=row_id)


class Rows(Generic[R]):
    """A table with its database: every call one transaction, durable when it returns."""

    def __init__(self, db: Database, table: Table[R]) -> None:
        self.db = db
        self.table = table

    async def insert(self, row: R) -> R:
        """Add a row (see `Table.insert_in`)."""
        return await self.db.write(lambda tx: self.table.insert_in(tx, row))

    async def get(self, ref: str) -> R:
        """Return by id, name or unambiguous id prefix (see `Table.get_in`)."""
        return await self.db.read(lambda tx: self.table.get_in(tx, ref))

    async def find(self, row_id: str) -> R | None:
        """Return the row of exactly this id, or None."""
        return await self.db.read(lambda tx: self.table.find_in(tx, row_id))

    async def list_all(self, *, limit: int = LIST_MAX) -> list[R]:
        """Return all rows, newest first."""
        return await self.db.read(lambda tx: self.table.list_in(tx, limit=limit))

    async def survey(self, *, limit: int = LIST_MAX) -> tuple[list[R], list[Damaged]]:
        """Return all rows that can be read, newest first, and those that cannot (see `Table.survey_in`)."""
        return await self.db.read(lambda tx: self.table.survey_in(tx, limit=limit))

    async def locate(self, ref: str) -> str:
        """Return the id of a row, also of a damaged one (see `Table.locate_in`)."""
        return await self.db.read(lambda tx: self.table.locate_in(tx, ref))

    async def all_ids(self) -> list[str]:
        """Return the ids of all rows, damaged ones too: what a collector must keep is told by the id alone."""

        def run(tx: Tx) -> list[str]:
            cell = "CAST(id AS BLOB)" if tx.dialect == SQLITE else "id"
            return [_as_text(row["id"]) for row in tx.execute(f"SELECT {cell} AS id FROM {self.table.name}")]

        return await self.db.read(run)

    async def update(self, row_id: str, **changes: object) -> R:
        """Change columns and return the row (see `Table.update_in`)."""
        return await self.db.write(lambda tx: self.table.update_in(tx, row_id, **changes))

    async def change(self, row_id: str, fn: Callable[[R], Mapping[str, object]]) -> R:
        """Read, decide and write in one transaction: `fn` gets the row, returns the changes or raises to change nothing."""

        def run(tx: Tx) -> R:
            row = self.table.find_in(tx, row_id)
            if row is None:
                raise _not_found(self.table.what, row_id)
            return self.table.update_in(tx, row_id, **fn(row))

        return await self.db.write(run)

    async def delete(self, row_id: str) -> bool:
        """Remove a row; False if there was none."""
        return await self.db.write(lambda tx: self.table.delete_in(tx, row_id))


def find_by_prefix(tx: Tx, table: str, what: str, prefix: str, ref: str, *, columns: str = "*") -> Row:
    """Return the one row whose id begins with `ref` or `prefix_ref`. Raises NotFound, BadInput if there are several."""
    for head in (ref, f"{prefix}_{ref}") if ref.isascii() and ref else ():
        rows = tx.execute(f"SELECT {columns} FROM {table} WHERE id >= ? AND id < ? LIMIT 2", (head, head + "~"))
        if len(rows) == 1:
            return rows[0]
        if rows:
            raise BadInput(f"{ref!r} is ambiguous: several {what}s begin with it", hint="give more of the id")
    raise _not_found(what, ref)


def _decoded_cells(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """Return a row whose texts came as bytes; one that is no UTF-8 stays bytes, which no record takes."""
    out: dict[str, Any] = {}
    for name in columns:
        value = row[name]
        if row[f"type_{name}"] == "text":
            with contextlib.suppress(UnicodeDecodeError):
                value = value.decode()
        out[name] = value
    return out


def _as_text(value: object) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _not_found(what: str, ref: str) -> NotFound:
    return NotFound(f"no such {what}: {ref[:200]}", hint=f"list what there is with `recess {_LIST.get(what, 'ps')}`",
                    kind=what, ref=ref[:200])  # fmt: skip


_LIST = {"machine": "ps -a", "snapshot": "snapshots ls", "template": "images ls", "session": "session ls"}


def _encode(value: object) -> str:
    try:
        return msgspec.json.encode(value, order="deterministic").decode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadInput(f"catalog: not JSON data: {exc}") from exc
