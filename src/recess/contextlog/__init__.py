"""Room `contextlog`: what was said and done in a session, append-only, on SQLite, Postgres or in memory.

It imports none of machines, snapshots or images, and none of them imports it.
"""

from recess.contextlog.bodies import BlobBodies, BodyStore, DirectoryBodies, MemoryBodies
from recess.contextlog.contract import INBOX_KINDS, Appended, ContextLog, Delta, Draft, Entry, SessionRow
from recess.contextlog.memory import MemoryLog
from recess.contextlog.migrations import SCHEMA
from recess.contextlog.sealing import LogKeeper, Sealing, identity_of
from recess.contextlog.sql import SqlLog, freeze_in

__all__ = [
    "INBOX_KINDS",
    "SCHEMA",
    "Appended",
    "BlobBodies",
    "BodyStore",
    "ContextLog",
    "Delta",
    "DirectoryBodies",
    "Draft",
    "Entry",
    "LogKeeper",
    "MemoryBodies",
    "MemoryLog",
    "Sealing",
    "SessionRow",
    "SqlLog",
    "freeze_in",
    "identity_of",
]
