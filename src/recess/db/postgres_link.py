"""One connection to a Postgres, with the settings that all of ours have. It must know no table and no transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import psycopg
from psycopg import pq

from recess.db.postgres_errors import translate
from recess.errors import BadInput, Incompatible

CONNECT_S = 5
SERVER_MIN = 130000  # pg_current_xact_id, as PostgreSQL 13 has it
_SETTINGS = {
    "statement_timeout": "60s",
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "10s",  # a node that stands still must not hold the others up
    "client_min_messages": "warning",
    "timezone": "UTC",
    "standard_conforming_strings": "on",
}
_KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}


class PgRow:
    """One row: values by column name or number."""

    __slots__ = ("_index", "_values")

    def __init__(self, values: Sequence[Any], index: dict[str, int]) -> None:
        self._values = values
        self._index = index

    def __getitem__(self, key: str | int) -> Any:
        return self._values[self._index[key] if isinstance(key, str) else key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def keys(self) -> list[str]:
        """Return the column names in order."""
        return list(self._index)


def _rows(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], PgRow]:
    result = cursor.pgresult  # not its description, which makes an object of each column
    names = [result.fname(n) or b"" for n in range(result.nfields)] if result is not None else []
    index = {name.decode(): n for n, name in enumerate(names)}
    return lambda values: PgRow(values, index)


@dataclass(frozen=True, eq=False)
class Session:
    """A connection, what to call it, and what is its own among others in one database: schema and channel."""

    conn: psycopg.Connection[Any]
    name: str
    schema: str
    channel: str

    def lost(self, exc: BaseException) -> bool:
        """Tell whether the connection is of no more use after this error: it is gone, or may be, or is in the middle of what
        was sent."""
        if self.conn.closed or self.conn.pgconn.pipeline_status != pq.PipelineStatus.OFF:
            return True
        return isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError) and (
            not exc.sqlstate or exc.sqlstate.startswith(("08", "57P", "25P03"))
        )

    def close(self) -> None:
        """Close it; may be called twice."""
        with contextlib.suppress(psycopg.Error):
            self.conn.close()


def open_session(url: str) -> Session:
    """Connect. Raises Unavailable, Refused (the password), BadInput (no such database, no such URL), Incompatible."""
    try:
        given = psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error as exc:
        raise BadInput("not the address of a database", hint="postgresql://USER:PASSWORD@HOST/NAME") from exc
    more: dict[str, Any] = {key: value for key, value in _KEEPALIVE.items() if key not in given}
    name = f"{given.get('host') or 'local'}/{given.get('dbname') or given.get('user') or ''}"
    try:
        conn: psycopg.Connection[Any] = psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=CONNECT_S,
            cursor_factory=psycopg.RawCursor,
            row_factory=_rows,
            **more,
        )
        try:
            if conn.info.server_version < SERVER_MIN:
                raise Incompatible(
                    f"database {name}: PostgreSQL {conn.info.server_version // 10000}, 13 or newer is needed"
                )
            for key, value in _SETTINGS.items():
                conn.execute("SELECT set_config($1, $2, false)", (key, value))
            found = conn.execute("SELECT current_schema(), current_setting('server_encoding')").fetchone()
            schema, encoding = (str(found[0] or ""), str(found[1])) if found else ("", "")
            if not schema:
                raise BadInput(f"database {name}: its search_path names no schema that exists")
            conn.execute("SELECT set_config('application_name', $1, false)", (f"recess/{schema}"[:63],))
            if encoding != "UTF8":
                raise Incompatible(f"database {name}: its encoding is {encoding}", hint="make one with ENCODING 'UTF8'")
        except BaseException:
            conn.close()
            raise
    except psycopg.Error as exc:
        raise translate(exc, name) from exc
    tag = blake2b(schema.encode(), digest_size=6).hexdigest()
    return Session(conn, name, schema, f"recess_{tag}")
