"""Which machine a creating call with an idempotency key has made: a lost answer is given again after a restart, too."""

from recess.db import Migration

ONCE = Migration(
    4,
    "once",
    (
        """CREATE TABLE catalog_once (
            key TEXT NOT NULL PRIMARY KEY, digest TEXT NOT NULL, machine TEXT NOT NULL, created REAL NOT NULL
        ) WITHOUT ROWID""",
        "CREATE INDEX catalog_once_machine ON catalog_once (machine)",
        "CREATE INDEX catalog_once_created ON catalog_once (created)",
    ),
)
