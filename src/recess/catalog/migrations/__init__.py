"""The catalog's schema, forward only. A text that ran anywhere is never edited: add a migration."""

from recess.catalog.migrations.m0001_first import FIRST
from recess.db import RoomSchema

SCHEMA = RoomSchema("catalog", (FIRST,))

__all__ = ["SCHEMA"]
