"""Machines, snapshots, templates, agent versions, nodes, tokens. Times in wall seconds, JSON columns hold objects."""

from recess.db import Migration

FIRST = Migration(
    1,
    "first",
    (
        """CREATE TABLE catalog_machine (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, spec TEXT NOT NULL, driver TEXT NOT NULL,
            template TEXT NOT NULL, snapshot TEXT NOT NULL, session TEXT NOT NULL, created REAL NOT NULL,
            exit_code INTEGER, status TEXT NOT NULL, meta TEXT NOT NULL
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX catalog_machine_name ON catalog_machine (name) WHERE name <> '' AND state <> 'dead'",
        "CREATE INDEX catalog_machine_session ON catalog_machine (session) WHERE session <> ''",
        """CREATE TABLE catalog_snapshot (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, machine TEXT NOT NULL, session TEXT NOT NULL,
            log_position INTEGER NOT NULL, epoch INTEGER NOT NULL, why TEXT NOT NULL, created REAL NOT NULL,
            template TEXT NOT NULL, parent TEXT NOT NULL, figures TEXT NOT NULL
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX catalog_snapshot_name ON catalog_snapshot (name) WHERE name <> ''",
        "CREATE INDEX catalog_snapshot_machine ON catalog_snapshot (machine, created)",
        "CREATE INDEX catalog_snapshot_session ON catalog_snapshot (session, log_position) WHERE session <> ''",
        """CREATE TABLE catalog_template (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, image TEXT NOT NULL, spec_key TEXT NOT NULL,
            manifest TEXT NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL, meta TEXT NOT NULL
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX catalog_template_name ON catalog_template (name) WHERE name <> ''",
        "CREATE UNIQUE INDEX catalog_template_key ON catalog_template (spec_key)",
        """CREATE TABLE catalog_agent (
            agent TEXT NOT NULL, version TEXT NOT NULL, deployed INTEGER NOT NULL, created REAL NOT NULL,
            size INTEGER NOT NULL, config TEXT NOT NULL, files TEXT NOT NULL, PRIMARY KEY (agent, version)
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX catalog_agent_deployed ON catalog_agent (deployed)",
        """CREATE TABLE catalog_node (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, address TEXT NOT NULL, state TEXT NOT NULL,
            capacity TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL, meta TEXT NOT NULL
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX catalog_node_name ON catalog_node (name) WHERE name <> ''",
        """CREATE TABLE catalog_token (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL, scopes TEXT NOT NULL,
            created REAL NOT NULL, expires REAL NOT NULL, last_used REAL NOT NULL
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX catalog_token_name ON catalog_token (name) WHERE name <> ''",
        "CREATE UNIQUE INDEX catalog_token_hash ON catalog_token (hash)",
    ),
)
