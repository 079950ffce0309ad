"""Rows of templates: which booted, pre-warmed machine stands for an image and a machine size. A template is a snapshot;
its manifest is a root for garbage collection as long as the row is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.catalog.table import Rows, Table
from recess.db import Database, Tx


@dataclass(frozen=True)
class TemplateRecord:
    """One template. `spec_key` (hash of all that went in) is unique; `manifest` is a snapshot id. Times in wall seconds."""

    id: str
    image: str
    spec_key: str
    manifest: str
    created: float
    last_used: float = 0.0
    name: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


TABLE: Table[TemplateRecord] = Table(
    "catalog_template", TemplateRecord, "template", "tpl", json=frozenset({"meta"}), tagged=True
)


class TemplateRows(Rows[TemplateRecord]):
    """Templates over a database: insert, get, find, list_all, update, change, delete, and the calls below."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, TABLE)

    async def by_key(self, spec_key: str) -> TemplateRecord | None:
        """Return the template made of exactly this, or None."""

        def run(tx: Tx) -> TemplateRecord | None:
            row = tx.one("SELECT * FROM catalog_template WHERE spec_key = ?", (spec_key,))
            return None if row is None else TABLE.decode(row)

        return await self.db.read(run)

    async def put(self, row: TemplateRecord) -> TemplateRecord:
        """Add a template in place of an older one of the same key (its manifest is lost or was rebuilt)."""

        def run(tx: Tx) -> TemplateRecord:
            tx.execute("DELETE FROM catalog_template WHERE spec_key = ?", (row.spec_key,))
            return TABLE.insert_in(tx, row)

        return await self.db.write(run)

    async def touch(self, template_id: str, *, now: float) -> None:
        """Note that it was used; relaxed durability, a lost note costs nothing."""
        await self.db.write(
            lambda tx: tx.execute("UPDATE catalog_template SET last_used = ? WHERE id = ?", (now, template_id)),
            durable=False,
        )

    async def forget_unused(self, root: str) -> int:
        """Forget the templates of a root image that no machine and no snapshot stands on; return how many went.

        One transaction, so that what is being made from one meanwhile either keeps it or has none of it. Raises Corrupt for a
        row that cannot be read.
        """

        def run(tx: Tx) -> int:
            rows = tx.execute(
                "SELECT * FROM catalog_template t WHERE NOT EXISTS (SELECT 1 FROM catalog_machine WHERE template = t.manifest)"
                " AND NOT EXISTS (SELECT 1 FROM catalog_snapshot WHERE template = t.manifest)"
            )
            spare = [row.id for row in map(TABLE.decode, rows) if row.meta.get("vm", {}).get("root") == root]
            for template_id in spare:
                tx.execute("DELETE FROM catalog_template WHERE id = ?", (template_id,))
            return len(spare)

        return await self.db.write(run)
