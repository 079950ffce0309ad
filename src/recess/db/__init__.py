"""Room `db`: a SQLite file or a Postgres, with group commit, consistent reads and forward-only migrations. Knows no table of
a room."""

from recess.db.contract import FOR_UPDATE, POSTGRES, SQLITE, Query, Row, Tx
from recess.db.database import SHARED, Database
from recess.db.errors import UniqueViolation
from recess.db.migrations import Migration, RoomSchema

__all__ = [
    "FOR_UPDATE",
    "POSTGRES",
    "SHARED",
    "SQLITE",
    "Database",
    "Migration",
    "Query",
    "RoomSchema",
    "Row",
    "Tx",
    "UniqueViolation",
]
