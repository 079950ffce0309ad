"""What a transaction is to the rooms, on either engine. It must know no engine and no table of a room.

Both engines take the same SQL: `?` marks a parameter, an upsert is `ON CONFLICT`, what changed is told by `RETURNING`, there
is no function that only one of them has. Where that cannot be, `Tx.dialect` tells which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

SQLITE = "sqlite"
POSTGRES = "postgres"
FOR_UPDATE = {SQLITE: "", POSTGRES: " FOR UPDATE"}  # see `Tx.for_update`

Query = tuple[str, Sequence[object]]  # SQL and its parameters


class Row(Protocol):
    """One row: values by column name or number."""

    def __getitem__(self, key: str | int, /) -> Any:
        """Return the value of a column."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yield the values in column order."""
        ...

    def keys(self) -> list[str]:
        """Return the column names in order."""
        ...


class Tx(ABC):
    """A transaction as rooms see it: SQL with `?` parameters in, all rows out. Valid only inside its function."""

    dialect = ""
    for_update = ""  # ends a SELECT of rows that this transaction will change: nobody else changes them meanwhile
    skip_locked = ""  # the same, and rows that somebody else has so are left out

    def __init__(self) -> None:
        self.committed: list[Callable[[], None]] = []
        self.notices: list[str] = []

    @abstractmethod
    def execute(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Run one statement and return its rows ([] for those that give none; use RETURNING to see what changed).

        A failure should end the transaction. That of a statement which gives no rows may be raised only by a later call, or
        by the commit: an engine may send such statements together.
        """

    @abstractmethod
    def attempt(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Like `execute`, for a statement that a unique index may refuse: raises UniqueViolation, after which the
        transaction goes on without it."""

    @abstractmethod
    def one(self, sql: str, params: Sequence[object] = ()) -> Row | None:
        """Run one statement and return its first row, or None."""

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call this on the caller's event loop once the write is durable, even if the caller was cancelled."""
        self.committed.append(callback)

    def notify(self, word: str) -> None:
        """Tell the other nodes on this database, once the write is durable; see `Database.listen`. Words have no spaces."""
        self.notices.append(word)
