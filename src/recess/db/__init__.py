"""Room `db`: a SQLite file or a Postgres, with group commit, consistent reads and forward-only migrations. Knows no table of
a room."""

from recess.db.contract import POSTGRES, SQLITE, Row, Tx
from recess.db.database import SHARED, Database
from recess.db.errors import UniqueViolation
from recess.db.migrations import Migration, RoomSchema

__all__ = ["POSTGRES", "SHARED", "SQLITE", "Database", "Migration", "RoomSchema", "Row", "Tx", "UniqueViolation"]
