"""The log's transactions in SQL: functions over a `Tx`, so that they can share one transaction with other rooms' rows.

All decisions are in `rules`; this module fetches what they need and writes what they say. It must not know event loops,
waiters or body stores: bodies come packed, blobs written already. Entries are read by `sql_read`.

Two nodes on one database: whoever writes into a session holds its row (`Tx.for_update`) from the check of the epoch to the
commit, and every change of a session's tables is made by somebody who holds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from recess.catalog.table import find_by_prefix
from recess.contextlog import blobs, lineage, rules, sql_blobs
from recess.contextlog.contract import Appended, Delta, SessionRow
from recess.contextlog.lineage import Range
from recess.contextlog.rules import Packed
from recess.db import FOR_UPDATE, POSTGRES, Query, Row, Tx, UniqueViolation
from recess.errors import Conflict, Corrupt, NameInUse, NotFound

_FIELDS = tuple(f.name for f in dataclasses.fields(SessionRow))
_JSON = frozenset({"labels", "meta"})
ENTRY = "session, position, kind, turn, ref, key, epoch, code_version, ts, schema, size, blob, body"

TOGETHER = 4  # entries in one statement; few, so that there are few different statements, and each is prepared once


@dataclass(frozen=True)
class SessionState:
    """A session's row, the ranges it inherited, and the last position of its own that is in a segment (0: none)."""

    row: SessionRow
    inherited: tuple[Range, ...]
    sealed: int = 0

    @property
    def ranges(self) -> list[Range]:
        """All ranges that make up its log."""
        return lineage.ranges_of(self.row.id, self.inherited, self.row.fork_position, self.row.head)


_LOAD = "SELECT * FROM log_session WHERE id = ?"


def ahead(dialect: str, session: str, packed: Sequence[Packed] = ()) -> list[Query]:
    """Return the queries that a write into a session begins with (see `Database.write`)."""
    keys = _keys_query(session, packed)
    return [(_LOAD + FOR_UPDATE[dialect], (session,)), *([keys] if keys else [])]


def load(tx: Tx, session: str) -> SessionState:
    """Return a session by its exact id, held until the commit in a transaction that writes. Raises NotFound, Corrupt."""
    row = tx.one(_LOAD + tx.for_update, (session,))
    if row is None:
        raise NotFound(f"no such session: {session[:200]}", hint="list them: recess session ls", kind="session",
                       ref=session[:200])  # fmt: skip
    return _decode_session(row)


def find(tx: Tx, ref: str) -> SessionRow:
    """Return by id, name (a live session's first), or unambiguous id prefix. Raises NotFound, BadInput, Corrupt."""
    row = tx.one("SELECT * FROM log_session WHERE id = ?", (ref,)) or tx.one(
        "SELECT * FROM log_session WHERE name = ? AND name <> '' ORDER BY state = 'closed', seq DESC", (ref,)
    )
    return _decode_session(row or find_by_prefix(tx, "log_session", "session", "ses", ref)).row


def list_rows(tx: Tx, states: Sequence[str], limit: int) -> list[SessionRow]:
    """Return sessions newest first, in any of these states (all without)."""
    where = f"WHERE state IN ({', '.join('?' * len(states))})" if states else ""
    rows = tx.execute(f"SELECT * FROM log_session {where} ORDER BY seq DESC LIMIT ?", (*states, limit))
    return [_decode_session(row).row for row in rows]


def insert_session(tx: Tx, row: SessionRow, inherited: Sequence[Range] = ()) -> SessionRow:
    """Add a session. Raises NameInUse (also for an id that exists)."""
    values = {name: _column(name, getattr(row, name)) for name in _FIELDS}
    values["lineage"] = lineage.encode(inherited)
    marks = ", ".join("?" * len(values))
    done = tx.execute(
        f"INSERT INTO log_session ({', '.join(values)}) VALUES ({marks}) ON CONFLICT DO NOTHING RETURNING id",
        tuple(values.values()),
    )
    if not done:
        raise _taken(tx, row.id, row.name)
    return row


def insert_with(
    tx: Tx, row: SessionRow, inherited: Sequence[Range], packed: Sequence[Packed], *, ts: float
) -> SessionRow:
    """Add a session with its own first entries; return its row behind them. Raises NameInUse."""
    _, head = _append(tx, insert_session(tx, row, inherited), packed, ts)
    return dataclasses.replace(row, head=head)


def set_columns(tx: Tx, session: str, changes: Mapping[str, Any]) -> SessionRow:
    """Change columns (checked by the caller) and return the row. Raises NameInUse."""
    sets = ", ".join(f"{name} = ?" for name in changes) or "id = id"
    values = tuple(_column(name, value) for name, value in changes.items())
    run = tx.attempt if "name" in changes else tx.execute  # what the index over names may refuse
    try:
        rows = run(f"UPDATE log_session SET {sets} WHERE id = ? RETURNING *", (*values, session))
    except UniqueViolation as exc:
        raise _taken(tx, "", str(changes.get("name", ""))) from exc
    return _decode_session(rows[0]).row


def claim_in(tx: Tx, session: str, owner: str, lease_until: float, *, now: float, force: bool) -> SessionRow:
    """Take the lease and raise the epoch (see the contract)."""
    row = load(tx, session).row
    rules.check_claim(row, owner, now, force=force)
    return set_columns(tx, session, {"epoch": row.epoch + 1, "owner": owner, "lease_until": lease_until})


def claim_abandoned_in(tx: Tx, owner: str, lease_until: float, *, now: float, limit: int) -> list[SessionRow]:
    """Take leases that have ended (see the contract). Rows that another node is just taking are passed over."""
    rows = tx.execute(
        "SELECT * FROM log_session WHERE owner <> '' AND lease_until < ? AND state <> 'closed' "
        f"ORDER BY lease_until LIMIT ?{tx.skip_locked}",
        (now, limit),
    )
    found = [_decode_session(row).row for row in rows]
    return [
        set_columns(tx, row.id, {"epoch": row.epoch + 1, "owner": owner, "lease_until": lease_until}) for row in found
    ]


def owned_in(tx: Tx, session: str, epoch: int) -> SessionRow:
    """Return the session if it is owned under this epoch. Raises Fenced, NotFound."""
    row = load(tx, session).row
    rules.check_owner(row, epoch)
    return row


def append_in(tx: Tx, session: str, epoch: int, packed: Sequence[Packed], *, ts: float) -> list[Appended]:
    """The owner append: check the epoch and the keys, take the next positions, insert. Raises Fenced, KeyReused."""
    return _append(tx, owned_in(tx, session, epoch), packed, ts)[0]


def append_inbox_in(tx: Tx, session: str, packed: Packed, *, ts: float) -> Appended:
    """The inbox append. A known key gets its old position even from a closed session. Raises KeyReused, IllegalState."""
    row = load(tx, session).row
    known = rules.place([packed], row.head, _known(tx, session, [packed]).get)[0]
    if known.replayed:
        return known.appended
    rules.check_open(row)
    return _append(tx, row, [packed], ts)[0][0]


def freeze_in(
    tx: Tx,
    session: str,
    epoch: int,
    *,
    consumed: int,
    snapshot: str,
    position: int,
    packed: Sequence[Packed] = (),
    ts: float,
) -> bool:
    """The check-and-set of `ContextLog.freeze` inside the caller's transaction: False, and nothing changed, if the inbox
    holds anything after `consumed`. The check and the state change are one transaction and inbox appends are
    transactions too, so a message is either seen here or finds the session frozen and wakes it: none is lost."""
    state = load(tx, session)
    rules.check_owner(state.row, epoch)
    if inbox_waits(tx, state, consumed):
        return False
    _, head = _append(tx, state.row, packed, ts)
    changes = {
        "state": rules.FROZEN,
        "consumed": consumed,
        "snapshot": snapshot,
        "snapshot_position": head if position < 0 else position,
        "owner": "",
        "lease_until": 0.0,
    }
    set_columns(tx, session, changes)
    return True


def close_in(tx: Tx, session: str, epoch: int | None) -> None:
    """End a session: its epoch is raised, so that whoever owned it is fenced. Closing a closed one does nothing."""
    row = load(tx, session).row
    if epoch is not None:
        rules.check_owner(row, epoch)
    if row.state == rules.CLOSED:
        return
    set_columns(tx, session, {"state": rules.CLOSED, "epoch": row.epoch + 1, "owner": "", "lease_until": 0.0})
    tx.execute("DELETE FROM log_delta WHERE session = ?", (session,))


def put_delta_in(tx: Tx, session: str, epoch: int, delta: Delta) -> None:
    """Keep a piece of a reply; `n = 0` drops what an earlier try of the same reply left. Raises Fenced.

    As bytes: a text of Postgres cannot hold every character that a model may say."""
    owned_in(tx, session, epoch)
    if delta.n == 0:
        tx.execute(
            "DELETE FROM log_delta WHERE session = ? AND turn = ? AND part = ?", (session, delta.turn, delta.part)
        )
    tx.execute(
        "INSERT INTO log_delta (session, turn, part, n, text) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (session, turn, part, n) DO UPDATE SET text = excluded.text",
        (session, delta.turn, delta.part, delta.n, delta.text.encode()),
    )


def deltas_in(tx: Tx, session: str) -> list[Delta]:
    """Return the session's deltas in order. Raises NotFound."""
    load(tx, session)
    rows = tx.execute("SELECT turn, part, n, text FROM log_delta WHERE session = ? ORDER BY turn, part, n", (session,))
    return [Delta(int(r["turn"]), int(r["part"]), int(r["n"]), bytes(r["text"]).decode()) for r in rows]


def inbox_waits(tx: Tx, state: SessionState, after: int) -> bool:
    """Tell whether the inbox holds anything after a position, lineage and segments included."""
    for part in lineage.clip(state.ranges, after, state.row.head):
        hot = tx.one(
            "SELECT 1 AS found FROM log_entry WHERE session = ? AND position BETWEEN ? AND ? "
            "AND kind IN ('user', 'answer', 'cancel') LIMIT 1",
            (part.owner, part.first, part.last),
        )
        if hot is not None or (may_be_sealed(state, part) and sealed_inbox(tx, part)):
            return True
    return False


def may_be_sealed(state: SessionState, part: Range) -> bool:
    """Tell whether a part of its log may be in segments: asked before asking the database."""
    return part.owner != state.row.id or part.first <= state.sealed


def sealed_inbox(tx: Tx, part: Range) -> list[int]:
    """Return the positions of a range's inbox entries that are in segments."""
    rows = tx.execute(
        "SELECT inbox FROM log_segment WHERE session = ? AND last >= ? AND first <= ? ORDER BY first",
        (part.owner, part.first, part.last),
    )
    found = [at for row in rows for at in msgspec.json.decode(row["inbox"], type=list[int])]
    return [at for at in found if part.first <= at <= part.last]


def _append(tx: Tx, row: SessionRow, packed: Sequence[Packed], ts: float) -> tuple[list[Appended], int]:
    """Append to a session that is held; return what became of each, and the head."""
    placed = rules.place(packed, row.head, _known(tx, row.id, packed).get)
    for item in placed:
        _drop_deltas(tx, row.id, item.packed)
    new = [item for item in placed if not item.replayed]
    head = max((item.position for item in new), default=row.head)
    joined = tx.dialect == POSTGRES
    step = TOGETHER if joined else 1
    for first in range(0, len(new), step):
        some = new[first : first + step]
        writes = [write for item in some for write in _rows_of(row, item.packed, item.position, ts)]
        if some[-1] is new[-1]:
            writes.append(("UPDATE log_session SET head = ? WHERE id = ?", (head, row.id)))
        for sql, params in [_as_one(writes)] if joined else writes:
            tx.execute(sql, params)
    return [item.appended for item in placed], head


def _rows_of(row: SessionRow, p: Packed, position: int, ts: float) -> list[Query]:
    """Return the inserts that make an entry."""
    entry = (
        row.id, position, p.kind, p.turn, p.ref, p.key, row.epoch, row.code_version, ts, p.schema,
        len(p.body), p.blob, None if p.blob else p.body.decode(), p.mark,
    )  # fmt: skip
    out: list[Query] = [
        (f"INSERT INTO log_entry ({ENTRY}, mark) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", entry)
    ]
    if p.key:
        values = (row.id, p.key, position, p.digest)
        out.append(("INSERT INTO log_key (session, key, position, digest) VALUES (?, ?, ?, ?)", values))
    if p.mark is not None:
        marked = (row.id, position, p.kind, p.mark)
        out.append(("INSERT INTO log_mark (session, position, kind, mark) VALUES (?, ?, ?, ?)", marked))
    if p.kind == blobs.KIND:
        out.append(sql_blobs.insert(row.id, position, p.body, p.pieces))
    return out


def _as_one(writes: Sequence[Query]) -> Query:
    """Return writes to different rows as one statement, which Postgres (not SQLite) takes: sending and running each by itself is
    most of what an append costs there. They are all done, or none is, whatever their order."""
    *parts, (last, _) = writes
    named = ", ".join(f"w{n} AS ({sql})" for n, (sql, _) in enumerate(parts))
    return f"WITH {named} {last}" if named else last, tuple(value for _, params in writes for value in params)


def _drop_deltas(tx: Tx, session: str, packed: Packed) -> None:
    ended = rules.ends_deltas(packed)
    if ended is None:
        return
    turn, part = ended
    where, params = ("", ()) if part is None else (" AND part = ?", (part,))
    tx.execute(f"DELETE FROM log_delta WHERE session = ? AND turn = ?{where}", (session, turn, *params))


def _known(tx: Tx, session: str, packed: Sequence[Packed]) -> dict[str, tuple[int, bytes]]:
    """Return position and digest of those keys that were used before."""
    query = _keys_query(session, packed)
    rows = tx.execute(*query) if query else []
    return {str(row["key"]): (int(row["position"]), bytes(row["digest"])) for row in rows}


def _keys_query(session: str, packed: Sequence[Packed]) -> Query | None:
    keys = [p.key for p in packed if p.key]
    marks = ", ".join("?" * len(keys))
    sql = f"SELECT key, position, digest FROM log_key WHERE session = ? AND key IN ({marks})"
    return (sql, (session, *keys)) if keys else None


def _column(name: str, value: object) -> object:
    return msgspec.json.encode(value, order="deterministic").decode() if name in _JSON else value


def _decode_session(row: Row) -> SessionState:
    try:
        values: dict[str, Any] = {name: row[name] for name in _FIELDS}
        for name in _JSON:
            values[name] = msgspec.json.decode(values[name])
        session = msgspec.convert(values, SessionRow)
        return SessionState(session, tuple(lineage.decode(row["lineage"])), int(row["sealed"]))
    except (msgspec.MsgspecError, TypeError) as exc:
        raise Corrupt(
            f"context log: session {row['id']!r} has an unreadable row: {exc}",
            hint="the database was changed by something else: restore a backup",
            session=str(row["id"]),
        ) from exc


def _taken(tx: Tx, session: str, name: str) -> Conflict:
    holder = tx.one("SELECT id FROM log_session WHERE id = ?", (session,))
    if holder is not None:
        return NameInUse(f"the session id {session} is in use", hint="leave it out to get a new one", ref=session)
    row = tx.one("SELECT id FROM log_session WHERE name = ? AND state <> 'closed'", (name,))
    other = str(row["id"]) if row else "another"
    return NameInUse(f"the name {name!r} is in use by session {other}", hint="choose another name", ref=other)
