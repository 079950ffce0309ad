"""Rows of snapshots: names, provenance and figures. The manifest in the blob store is the truth about the bytes; a row
without a manifest is removed, a manifest without a row is garbage. It must not know what a figure means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.catalog.table import Rows, Table
from recess.db import Database, Tx


@dataclass(frozen=True)
class SnapshotRecord:
    """One snapshot. `id` is `snp_` and the manifest's hash; `name` may be tagged ("base:v1"). `created` in wall seconds."""

    id: str
    name: str
    machine: str
    created: float
    session: str = ""
    log_position: int = 0
    epoch: int = 0
    why: str = "manual"
    template: str = ""
    parent: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


TABLE: Table[SnapshotRecord] = Table(
    "catalog_snapshot", SnapshotRecord, "snapshot", "snp", json=frozenset({"figures"}), tagged=True
)


def insert_in(tx: Tx, row: SnapshotRecord) -> SnapshotRecord:
    """Add a snapshot inside the caller's transaction (the freeze check-and-set). Raises NameInUse, BadInput, Conflict."""
    return TABLE.insert_in(tx, row)


def update_in(tx: Tx, snapshot_id: str, **changes: object) -> SnapshotRecord:
    """Change columns inside the caller's transaction. Raises NotFound, NameInUse, BadInput."""
    return TABLE.update_in(tx, snapshot_id, **changes)


class SnapshotRows(Rows[SnapshotRecord]):
    """Snapshots over a database: insert, get, find, list_all, update, change, delete, and the lists below."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, TABLE)

    async def list_of_machine(self, machine: str) -> list[SnapshotRecord]:
        """Return the machine's snapshots, newest first."""
        return await self.db.read(lambda tx: TABLE.list_in(tx, "machine = ?", (machine,)))

    async def newest_of_session(self, session: str, *, at: int | None = None) -> SnapshotRecord | None:
        """Return the session's newest snapshot whose log position is at most `at` (any position without), or None."""
        where, params = "session = ? AND session <> ''", [session]
        limit = (1 << 62) if at is None else at

        def run(tx: Tx) -> SnapshotRecord | None:
            row = tx.one(
                f"SELECT * FROM catalog_snapshot WHERE {where} AND log_position <= ? "
                "ORDER BY log_position DESC, created DESC",
                (*params, limit),
            )
            return None if row is None else TABLE.decode(row)

        return await self.db.read(run)
