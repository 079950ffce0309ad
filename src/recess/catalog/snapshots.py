"""Rows of snapshots: names, provenance and figures. The manifest in the blob store is the truth about the bytes; a row
without a manifest is removed, a manifest without a row is garbage. It must not know what a figure means.

Ids never change, names move: `NAME:TAG` points to one snapshot until it is given to another; `NAME` alone is the head of
the name, which a snapshot taken under `NAME` or any `NAME:TAG` becomes ("latest" is another word for it). Names are rows
of `catalog_snapshot_ref`; `SnapshotRecord.name` is what lists show, the newest of a snapshot's names, a tag before a
head, and is changed only here, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from recess.catalog.names import check_name
from recess.catalog.table import Rows, Table
from recess.db import Database, Tx

LATEST = "latest"


@dataclass(frozen=True)
class SnapshotRecord:
    """One snapshot. `id` is `snp_` and the manifest's hash. Times in wall seconds; `expires` 0: never."""

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
    expires: float = 0.0


TABLE: Table[SnapshotRecord] = Table(
    "catalog_snapshot", SnapshotRecord, "snapshot", "snp", json=frozenset({"figures"}), tagged=True
)


def split_ref(ref: str) -> tuple[str, str]:
    """Return (name, tag) of `NAME` or `NAME:TAG`; the tag of a head is ""."""
    name, _, tag = ref.partition(":")
    return name, "" if tag == LATEST else tag


def join_ref(name: str, tag: str) -> str:
    """Return `NAME:TAG`, or `NAME` for a head."""
    return f"{name}:{tag}" if tag else name


def insert_in(tx: Tx, row: SnapshotRecord) -> SnapshotRecord:
    """Add a snapshot inside the caller's transaction (the freeze check-and-set). A name it brings becomes its own, and
    it the head of that name, whoever had them before. Raises BadInput, Conflict."""
    TABLE.insert_in(tx, replace(row, name=""))
    if not row.name:
        return row
    name, tag = split_ref(check_name(row.name, "snapshot", tagged=True))
    if tag:
        _point_in(tx, name, "", row.id, row.created)
    _point_in(tx, name, tag, row.id, row.created)
    return TABLE.get_in(tx, row.id)


def update_in(tx: Tx, snapshot_id: str, **changes: object) -> SnapshotRecord:
    """Change columns (never the name) inside the caller's transaction. Raises NotFound, BadInput."""
    return TABLE.update_in(tx, snapshot_id, **changes)


def find_ref_in(tx: Tx, ref: str) -> SnapshotRecord | None:
    """Return the snapshot that a name points to now, or None."""
    name, tag = split_ref(ref)
    row = tx.one("SELECT snapshot FROM catalog_snapshot_ref WHERE name = ? AND tag = ?", (name, tag))
    return None if row is None else TABLE.find_in(tx, row["snapshot"])


def tag_in(tx: Tx, snapshot_id: str, ref: str, *, now: float) -> str:
    """Point a name at a snapshot; return the id it pointed to before, or "". The head follows only if it has none, or
    is what was asked for. Raises BadInput."""
    name, tag = split_ref(check_name(ref, "snapshot", tagged=True))
    before = find_ref_in(tx, ref)
    if tag and find_ref_in(tx, name) is None:
        _point_in(tx, name, "", snapshot_id, now)
    _point_in(tx, name, tag, snapshot_id, now)
    return before.id if before is not None else ""


def untag_in(tx: Tx, ref: str) -> bool:
    """Take a name away from its snapshot, which stays; False if there is no such name."""
    name, tag = split_ref(ref)
    rows = tx.execute("DELETE FROM catalog_snapshot_ref WHERE name = ? AND tag = ? RETURNING snapshot", (name, tag))
    for row in rows:
        _rename_in(tx, row["snapshot"])
    return bool(rows)


def delete_in(tx: Tx, snapshot_id: str) -> bool:
    """Remove a row, its names, and itself as a parent: its children become its parent's, so that the tree stays whole.

    The head of a name that loses its snapshot goes back to the newest snapshot with a tag of that name.
    """
    found = tx.execute("DELETE FROM catalog_snapshot WHERE id = ? RETURNING parent", (snapshot_id,))
    if not found:
        return False
    tx.execute("UPDATE catalog_snapshot SET parent = ? WHERE parent = ?", (found[0]["parent"], snapshot_id))
    gone = tx.execute("DELETE FROM catalog_snapshot_ref WHERE snapshot = ? RETURNING name, tag, moved", (snapshot_id,))
    for row in gone:
        if row["tag"]:
            continue
        heir = tx.one(
            "SELECT r.snapshot FROM catalog_snapshot_ref r JOIN catalog_snapshot s ON s.id = r.snapshot "
            "WHERE r.name = ? ORDER BY s.created DESC, r.moved DESC",
            (row["name"],),
        )
        if heir is not None:
            _point_in(tx, row["name"], "", heir["snapshot"], row["moved"])
    return True


def _point_in(tx: Tx, name: str, tag: str, snapshot_id: str, now: float) -> None:
    key = (name, tag)
    old = tx.one("SELECT snapshot FROM catalog_snapshot_ref WHERE name = ? AND tag = ?", key)
    tx.execute("DELETE FROM catalog_snapshot_ref WHERE name = ? AND tag = ?", key)
    if old is not None:
        _rename_in(tx, old["snapshot"])  # first: a name may stand in one row only
    tx.execute("INSERT INTO catalog_snapshot_ref (name, tag, snapshot, moved) VALUES (?, ?, ?, ?)",
               (*key, snapshot_id, now))  # fmt: skip
    _rename_in(tx, snapshot_id)


def _rename_in(tx: Tx, snapshot_id: str) -> None:
    best = tx.one(
        "SELECT name, tag FROM catalog_snapshot_ref WHERE snapshot = ? ORDER BY (tag <> '') DESC, moved DESC, name, tag",
        (snapshot_id,),
    )
    shown = "" if best is None else join_ref(best["name"], best["tag"])
    tx.execute("UPDATE catalog_snapshot SET name = ? WHERE id = ?", (shown, snapshot_id))


class SnapshotRows(Rows[SnapshotRecord]):
    """Snapshots over a database: get, find, list_all, update, change, and the calls below."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, TABLE)

    async def insert(self, row: SnapshotRecord) -> SnapshotRecord:
        """Add a snapshot (see `insert_in`)."""
        return await self.db.write(lambda tx: insert_in(tx, row))

    async def delete(self, row_id: str) -> bool:
        """Remove a snapshot (see `delete_in`)."""
        return await self.db.write(lambda tx: delete_in(tx, row_id))

    async def get(self, ref: str) -> SnapshotRecord:
        """Return by id, `NAME[:TAG]`, or unambiguous id prefix. Raises NotFound, BadInput, Corrupt."""

        def run(tx: Tx) -> SnapshotRecord:
            return find_ref_in(tx, ref) or TABLE.get_in(tx, ref)

        return await self.db.read(run)

    async def names(self) -> dict[str, list[str]]:
        """Return all names by snapshot id, the one that lists show first."""

        def run(tx: Tx) -> dict[str, list[str]]:
            out: dict[str, list[str]] = {}
            for row in tx.execute(
                "SELECT * FROM catalog_snapshot_ref ORDER BY (tag <> '') DESC, moved DESC, name, tag"
            ):
                out.setdefault(row["snapshot"], []).append(join_ref(row["name"], row["tag"]))
            return out

        return await self.db.read(run)

    async def readable(self) -> list[SnapshotRecord]:
        """Return every row that can be read, newest first, however many there are."""
        return await self.db.read(lambda tx: TABLE.survey_in(tx)[0])

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
