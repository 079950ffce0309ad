"""The log's schema, forward only. A text that ran anywhere is never edited: add a migration."""

from recess.contextlog.migrations.m0001_first import FIRST
from recess.contextlog.migrations.m0002_segments import SEGMENTS
from recess.contextlog.migrations.m0003_identity import IDENTITY
from recess.contextlog.migrations.m0004_blobs import BLOBS
from recess.db import RoomSchema

SCHEMA = RoomSchema("contextlog", (FIRST, SEGMENTS, IDENTITY, BLOBS))

__all__ = ["SCHEMA"]
