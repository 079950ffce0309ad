"""All tables of the catalog over one database. It must know nothing of what the rows stand for."""

from __future__ import annotations

from recess.catalog.agents import AgentRows
from recess.catalog.machines import MachineRows
from recess.catalog.nodes import NodeRows, TokenRows
from recess.catalog.once import OnceRows
from recess.catalog.snapshots import SnapshotRows
from recess.catalog.templates import TemplateRows
from recess.db import Database


class Catalog:
    """`catalog.machines`, `.snapshots`, `.templates`, `.agents`, `.nodes`, `.tokens`, `.once`; `db` was opened with SCHEMA.
    `node` names this one among those that share it ("": nobody does)."""

    def __init__(self, db: Database, *, node: str = "") -> None:
        self.db = db
        self.machines = MachineRows(db, node)
        self.snapshots = SnapshotRows(db)
        self.templates = TemplateRows(db)
        self.agents = AgentRows(db)
        self.nodes = NodeRows(db)
        self.tokens = TokenRows(db)
        self.once = OnceRows(db)
