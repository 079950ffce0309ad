"""Names of snapshots get a table of their own (a snapshot may have several, a name moves), snapshots a time to live.

`catalog_snapshot.name` stays: it is what the snapshot is called in lists, kept in step with this table in the same
transaction. The tag "" is the head of a name.
"""

from recess.db import Migration

SNAPSHOT_REFS = Migration(
    2,
    "snapshot refs",
    (
        """CREATE TABLE catalog_snapshot_ref (
            name TEXT NOT NULL, tag TEXT NOT NULL, snapshot TEXT NOT NULL, moved REAL NOT NULL,
            PRIMARY KEY (name, tag)
        ) WITHOUT ROWID""",
        "CREATE INDEX catalog_snapshot_ref_snapshot ON catalog_snapshot_ref (snapshot)",
        "ALTER TABLE catalog_snapshot ADD COLUMN expires REAL NOT NULL DEFAULT 0",
        """INSERT INTO catalog_snapshot_ref (name, tag, snapshot, moved)
            SELECT CASE instr(name, ':') WHEN 0 THEN name ELSE substr(name, 1, instr(name, ':') - 1) END,
                   CASE instr(name, ':') WHEN 0 THEN '' ELSE substr(name, instr(name, ':') + 1) END, id, created
            FROM catalog_snapshot WHERE name <> ''""",
        """INSERT INTO catalog_snapshot_ref (name, tag, snapshot, moved)
            SELECT name, '', snapshot, moved FROM catalog_snapshot_ref AS r WHERE tag <> ''
            AND NOT EXISTS (SELECT 1 FROM catalog_snapshot_ref AS h WHERE h.name = r.name AND h.tag = '')
            AND moved = (SELECT max(moved) FROM catalog_snapshot_ref AS n WHERE n.name = r.name)
            AND tag = (SELECT max(tag) FROM catalog_snapshot_ref AS t WHERE t.name = r.name AND t.moved = r.moved)""",
    ),
)
