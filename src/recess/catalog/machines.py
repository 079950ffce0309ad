"""Rows of machines: what a restarted server needs to find its machines again. It must not know what a spec means.

On a database that several nodes share, each has rows of its own and sees no others': a machine's VM, disk and sockets are on
its node. Names and ids are of all nodes together, and so is what a collector of snapshots must keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recess.catalog.once import Once, claim_in
from recess.catalog.table import LIST_MAX, Damaged, Rows, Table
from recess.db import Database, Tx
from recess.errors import NotFound

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
    node: str = ""  # set by the rows of that node


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

    def __init__(self, db: Database, node: str = "") -> None:
        super().__init__(db, TABLE)
        self._node = node

    async def insert(self, row: MachineRecord, once: Once | None = None) -> MachineRecord:
        """Add a machine of this node (see `Table.insert_in`), and with it the key of the call that makes it."""
        own = replace(row, node=self._node)

        def run(tx: Tx) -> MachineRecord:
            if once is not None:
                claim_in(tx, once, own.id, own.created)
            return TABLE.insert_in(tx, own)

        return await self.db.write(run)

    async def get(self, ref: str) -> MachineRecord:
        """Return by id, name or unambiguous id prefix (see `Table.get_in`). Raises NotFound for another node's, too."""
        return self._own(await super().get(ref))

    async def find(self, row_id: str) -> MachineRecord | None:
        """Return this node's row of exactly this id, or None."""
        row = await super().find(row_id)
        return row if row is not None and row.node == self._node else None

    async def list_all(self, *, limit: int = LIST_MAX) -> list[MachineRecord]:
        """Return this node's machines, newest first."""
        return await self._list("1 = 1", (), limit)

    async def survey_in_states(self, states: Sequence[str]) -> tuple[list[MachineRecord], list[Damaged]]:
        """Return the machines in any of these states (readable rows, damaged rows), however many there are."""
        where = f"state IN ({_marks(states)}) AND node = ?"
        return await self.db.read(lambda tx: TABLE.survey_in(tx, where, (*states, self._node)))

    async def list_of_session(self, session: str) -> list[MachineRecord]:
        """Return the session's machines, newest first."""
        return await self._list("session = ? AND session <> ''", (session,), LIST_MAX)

    async def survey(self, *, limit: int = LIST_MAX) -> tuple[list[MachineRecord], list[Damaged]]:
        """Return this node's rows that can be read, newest first, and those that cannot (see `Table.survey_in`)."""
        return await self.db.read(lambda tx: TABLE.survey_in(tx, "node = ?", (self._node,), limit=limit))

    async def survey_vms(self, gone: Sequence[str]) -> tuple[list[MachineRecord], list[Damaged]]:
        """Return the machines in any state but these (readable rows, damaged rows), however many there are."""
        where = f"state NOT IN ({_marks(gone)}) AND node = ?"
        return await self.db.read(lambda tx: TABLE.survey_in(tx, where, (*gone, self._node)))

    async def _list(self, where: str, params: Sequence[str], limit: int) -> list[MachineRecord]:
        where = f"{where} AND node = ?"
        return await self.db.read(lambda tx: TABLE.list_in(tx, where, (*params, self._node), limit=limit))

    def _own(self, row: MachineRecord) -> MachineRecord:
        if row.node == self._node:
            return row
        raise NotFound(
            f"machine {row.name or row.id} is on another node", hint=f"ask {row.node or 'that one'}", kind="machine",
            ref=row.id,
        )  # fmt: skip
