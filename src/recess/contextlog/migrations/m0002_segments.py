"""Old rows move to segments in the blob store; what must be found without reading the past gets rows of its own.

`log_segment` names a run of a session's entries that are in a blob (`contextlog.segments`) and no longer in `log_entry`; `inbox`
are the positions of its inbox entries, `bodies` the large bodies that it refers to, both JSON. `log_session.sealed` is the
last position of the session's own that is in a segment. `log_mark` takes the place of the index over `log_entry.mark`,
because a mark must be found when its entry is sealed. The text of a delta becomes bytes, UTF-8: a text of Postgres cannot hold
every character that a model may say. `log_session_owned` is for whoever looks for leases that have ended.
"""

from recess.db import Migration

SEGMENTS = Migration(
    2,
    "segments",
    (
        """CREATE TABLE log_segment (
            session TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, key TEXT NOT NULL, hash TEXT NOT NULL,
            size INTEGER NOT NULL, created REAL NOT NULL, inbox TEXT NOT NULL, bodies TEXT NOT NULL,
            PRIMARY KEY (session, first)
        )""",
        """CREATE TABLE log_mark (
            session TEXT NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, mark INTEGER NOT NULL,
            PRIMARY KEY (session, position)
        ) WITHOUT ROWID""",
        """INSERT INTO log_mark (session, position, kind, mark)
            SELECT session, position, kind, mark FROM log_entry WHERE mark IS NOT NULL""",
        "DROP INDEX log_entry_mark",
        "ALTER TABLE log_session ADD COLUMN sealed INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE log_piece (
            session TEXT NOT NULL, turn INTEGER NOT NULL, part INTEGER NOT NULL, n INTEGER NOT NULL, text BLOB NOT NULL,
            PRIMARY KEY (session, turn, part, n)
        ) WITHOUT ROWID""",
        """INSERT INTO log_piece (session, turn, part, n, text)
            SELECT session, turn, part, n, CAST(text AS BLOB) FROM log_delta""",
        "DROP TABLE log_delta",
        "ALTER TABLE log_piece RENAME TO log_delta",
        "CREATE INDEX log_session_owned ON log_session (lease_until) WHERE owner <> ''",
    ),
)
