"""Which node a machine is on: each node of a cluster looks after its own, and "" is the only one of a home by itself."""

from recess.db import Migration

MACHINE_NODE = Migration(
    3,
    "machine node",
    (
        "ALTER TABLE catalog_machine ADD COLUMN node TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX catalog_machine_node ON catalog_machine (node) WHERE node <> ''",
    ),
)
