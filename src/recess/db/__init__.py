"""Room `db`: one SQLite file with group commit, consistent reads and forward-only migrations. Knows no table of a room."""

from recess.db.database import Database, Row, Tx
from recess.db.errors import UniqueViolation
from recess.db.migrations import Migration, RoomSchema

__all__ = ["Database", "Migration", "RoomSchema", "Row", "Tx", "UniqueViolation"]
