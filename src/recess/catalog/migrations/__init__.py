"""The catalog's schema, forward only. A text that ran anywhere is never edited: add a migration."""

from recess.catalog.migrations.m0001_first import FIRST
from recess.catalog.migrations.m0002_snapshot_refs import SNAPSHOT_REFS
from recess.catalog.migrations.m0003_machine_node import MACHINE_NODE
from recess.catalog.migrations.m0004_once import ONCE
from recess.db import RoomSchema

SCHEMA = RoomSchema("catalog", (FIRST, SNAPSHOT_REFS, MACHINE_NODE, ONCE))

__all__ = ["SCHEMA"]
