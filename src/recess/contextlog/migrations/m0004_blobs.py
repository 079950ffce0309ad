"""Which blobs a session's log names: bytes that its agent put beside the log (`contextlog.blobs`).

`pieces` is JSON, [[hash, size], ...], of bodies in the body store; `hash` is the SHA-256 of the whole. The row lives beside its entry, which
may be sealed meanwhile. `until` is 0 while an open session reaches the blob, else the wall time after which it is given back.
"""

from recess.db import Migration

BLOBS = Migration(
    4,
    "blobs",
    (
        """CREATE TABLE log_blob (
            session TEXT NOT NULL, position INTEGER NOT NULL, hash TEXT NOT NULL, size INTEGER NOT NULL,
            media_type TEXT NOT NULL, name TEXT NOT NULL, pieces TEXT NOT NULL, until REAL NOT NULL,
            PRIMARY KEY (session, position)
        )""",
        "CREATE INDEX log_blob_hash ON log_blob (session, hash)",
    ),
)
