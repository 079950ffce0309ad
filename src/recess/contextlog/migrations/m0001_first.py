"""Sessions, entries, keys, deltas.

`log_entry` is a rowid table: entries of all sessions are appended at its end, whatever their size, and only the small
(session, position) index is written in its middle (measured on mixed bodies: -24 % CPU and -23 % bytes a row against
WITHOUT ROWID, whose rows over 1 kB go to overflow pages).

`lineage` is what a session inherited, [[owner, first, last], ...]. A body is in `body` (canonical JSON) or, if `blob` is
set, in the body store; `size` counts its bytes. `mark` (see `contextlog.rules`) lets a tail be found without reading the
past. `log_key` is a table of its own because keys live as long as the session, rows only until they are sealed.
"""

from recess.db import Migration

FIRST = Migration(
    1,
    "first",
    (
        """CREATE TABLE log_session (
            seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, agent TEXT NOT NULL,
            code_version TEXT NOT NULL, state TEXT NOT NULL, head INTEGER NOT NULL, consumed INTEGER NOT NULL,
            epoch INTEGER NOT NULL, owner TEXT NOT NULL, lease_until REAL NOT NULL, parent TEXT NOT NULL,
            fork_position INTEGER NOT NULL, snapshot TEXT NOT NULL, snapshot_position INTEGER NOT NULL,
            turn INTEGER NOT NULL, attempts INTEGER NOT NULL, created REAL NOT NULL, labels TEXT NOT NULL,
            meta TEXT NOT NULL, lineage TEXT NOT NULL
        )""",
        "CREATE UNIQUE INDEX log_session_name ON log_session (name) WHERE name <> '' AND state <> 'closed'",
        """CREATE TABLE log_entry (
            session TEXT NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, turn INTEGER NOT NULL,
            ref TEXT NOT NULL, key TEXT NOT NULL, epoch INTEGER NOT NULL, code_version TEXT NOT NULL, ts REAL NOT NULL,
            schema INTEGER NOT NULL, mark INTEGER, size INTEGER NOT NULL, blob TEXT NOT NULL, body TEXT,
            PRIMARY KEY (session, position)
        )""",
        "CREATE INDEX log_entry_mark ON log_entry (session, position) WHERE mark IS NOT NULL",
        """CREATE INDEX log_entry_inbox ON log_entry (session, position)
            WHERE kind IN ('user', 'answer', 'cancel')""",
        """CREATE TABLE log_key (
            session TEXT NOT NULL, key TEXT NOT NULL, position INTEGER NOT NULL, digest BLOB NOT NULL,
            PRIMARY KEY (session, key)
        ) WITHOUT ROWID""",
        """CREATE TABLE log_delta (
            session TEXT NOT NULL, turn INTEGER NOT NULL, part INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL,
            PRIMARY KEY (session, turn, part, n)
        ) WITHOUT ROWID""",
    ),
)
