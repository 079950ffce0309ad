"""Which log this is: a name in stores that several logs may share, so that one never sweeps what is another's."""

from recess.db import Migration

IDENTITY = Migration(
    3, "identity", ("CREATE TABLE log_identity (one INTEGER PRIMARY KEY, id TEXT NOT NULL, made REAL NOT NULL)",)
)
