"""Rows of machines: what a restarted server needs to find its machines again. It must not know what a spec means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recess.catalog.table import LIST_MAX, Damaged, Rows, Table
from recess.db import Database, Tx

DEAD = "dead"  # the one state the catalog knows: a dead machine gives its name free


@dataclass(frozen=True)
class MachineRecord:
    """One machine. `state` is the machines room's word; `spec` and `meta` are its JSON. `created` in wall seconds."""

    id: str
    name: str
    state: str
    spec: Mapping[str, Any]
    driver: str
    created: float
    template: str = ""
    snapshot: str = ""
    session: str = ""
    exit_code: int | None = None
    status: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


TABLE: Table[MachineRecord] = Table(
    "catalog_machine",
    MachineRecord,
    "machine",
    "mch",
    json=frozenset({"spec", "meta"}),
    holds_name=f"state <> '{DEAD}'",
)


def insert_in(tx: Tx, row: MachineRecord) -> MachineRecord:
    """Add a machine inside the caller's transaction. Raises NameInUse, BadInput, Conflict."""
    return TABLE.insert_in(tx, row)


def update_in(tx: Tx, machine_id: str, **changes: object) -> MachineRecord:
    """Change columns inside the caller's transaction. Raises NotFound, NameInUse, BadInput."""
    return TABLE.update_in(tx, machine_id, **changes)


def _marks(states: Sequence[str]) -> str:
    return ", ".join("?" * len(states)) or "''"  # no state is called so, and a list of none is no SQL everywhere


class MachineRows(Rows[MachineRecord]):
    """Machines over a database: insert, get, find, list_all, update, change, delete, and the lists below."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, TABLE)

    async def list_in_states(self, states: Sequence[str], *, limit: int = LIST_MAX) -> list[MachineRecord]:
        """Return the machines in any of these states, newest first."""
        where = f"state IN ({_marks(states)})"
        return await self.db.read(lambda tx: TABLE.list_in(tx, where, states, limit=limit))

    async def survey_vms(self, gone: Sequence[str]) -> tuple[list[MachineRecord], list[Damaged]]:
        """Return the machines in any state but these (readable rows, damaged rows), however many there are."""
        where = f"state NOT IN ({_marks(gone)})"
        return await self.db.read(lambda tx: TABLE.survey_in(tx, where, gone))

    async def list_of_session(self, session: str) -> list[MachineRecord]:
        """Return the session's machines, newest first."""
        return await self.db.read(lambda tx: TABLE.list_in(tx, "session = ? AND session <> ''", (session,)))
