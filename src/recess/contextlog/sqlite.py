"""The context log over a `Database`: what every embedded Recess uses. One method, one transaction (`sqlite_tx`).

Crash safety: a method's effects are in one SQLite transaction, durable when it returns (deltas: relaxed). A large body is
durable in the body store before the row that names it. Waiters are woken after the commit, on the caller's event loop,
even if the caller was cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from recess.clock import Clock, SystemClock
from recess.contextlog import lineage, rules
from recess.contextlog import sqlite_tx as sql
from recess.contextlog.bodies import BodyStore
from recess.contextlog.branch import plan_tail
from recess.contextlog.contract import Appended, Delta, Draft, Entry, SessionRow
from recess.contextlog.rules import Packed
from recess.contextlog.sqlite_tx import freeze_in
from recess.contextlog.wake import WakeHub
from recess.db import Database, Row, Tx
from recess.errors import Corrupt
from recess.ids import new_id

__all__ = ["SqliteLog", "freeze_in"]

T = TypeVar("T")

READ_MAX = 10_000
_BODY = msgspec.json.Decoder(dict[str, Any])


class SqliteLog:
    """`ContextLog` on SQLite. `db` was opened with `recess.contextlog.SCHEMA`; `bodies` keeps bodies over 16 KiB."""

    def __init__(self, db: Database, bodies: BodyStore, clock: Clock | None = None) -> None:
        self._db = db
        self._bodies = bodies
        self._clock = clock or SystemClock()
        self._hub = WakeHub(self._clock)

    async def create(
        self,
        *,
        agent: str,
        code_version: str,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        meta: Mapping[str, Any] | None = None,
        session_id: str = "",
    ) -> SessionRow:
        """Make an empty session (see the contract)."""
        row = rules.new_session(
            session_id or new_id("ses"), agent, code_version, name, labels or {}, meta or {}, self._clock.wall_s()
        )
        return await self._change(row.id, lambda tx: sql.insert_session(tx, row))

    async def get(self, ref: str) -> SessionRow:
        """Return by id, name or unambiguous id prefix."""
        return await self._db.read(lambda tx: sql.find(tx, ref))

    async def list_sessions(self, *, states: Sequence[str] = (), limit: int = 1000) -> list[SessionRow]:
        """Return newest first."""
        return await self._db.read(lambda tx: sql.list_rows(tx, states, limit))

    async def claim(self, session: str, owner: str, lease_s: float, *, now: float, force: bool = False) -> SessionRow:
        """Take the lease, raise the epoch (see the contract)."""
        return await self._change(
            session, lambda tx: sql.claim_in(tx, session, owner, now + lease_s, now=now, force=force)
        )

    async def renew(self, session: str, epoch: int, lease_s: float, *, now: float) -> None:
        """Extend the lease; Fenced if the epoch is stale. Wakes nobody."""

        def run(tx: Tx) -> None:
            sql.owned_in(tx, session, epoch)
            sql.set_columns(tx, session, {"lease_until": now + lease_s})

        await self._db.write(run)

    async def append(self, session: str, epoch: int, drafts: Sequence[Draft]) -> list[Appended]:
        """Owner append, all or nothing (see the contract)."""
        packed = await self._offload(rules.pack_all(drafts))
        ts = self._clock.wall_s()
        return await self._change(session, lambda tx: sql.append_in(tx, session, epoch, packed, ts=ts))

    async def append_inbox(self, session: str, draft: Draft) -> Appended:
        """Inbox append (see the contract)."""
        packed = (await self._offload([rules.pack(draft, inbox=True)]))[0]
        ts = self._clock.wall_s()
        return await self._change(session, lambda tx: sql.append_inbox_in(tx, session, packed, ts=ts))

    async def update(self, session: str, epoch: int, **changes: Any) -> SessionRow:
        """Owner: set columns of the session's row (see the contract)."""
        checked = rules.check_changes(changes)

        def run(tx: Tx) -> SessionRow:
            sql.owned_in(tx, session, epoch)
            return sql.set_columns(tx, session, checked)

        return await self._change(session, run)

    async def freeze(
        self,
        session: str,
        epoch: int,
        *,
        consumed: int,
        snapshot: str,
        position: int,
        drafts: Sequence[Draft] = (),
        also: Callable[[Tx], None] | None = None,
    ) -> bool:
        """The check-and-set (see the contract). `also` runs in the same transaction if the freeze goes through: rows of
        other rooms (a snapshot's) appear with it or not at all."""
        packed = await self._offload(rules.pack_all(drafts))
        ts = self._clock.wall_s()

        def run(tx: Tx) -> bool:
            frozen = freeze_in(
                tx, session, epoch, consumed=consumed, snapshot=snapshot, position=position, packed=packed, ts=ts
            )
            if frozen and also is not None:
                also(tx)
            return frozen

        return await self._change(session, run)

    async def release(self, session: str, epoch: int, *, state: str) -> None:
        """Give the lease back with this state; Fenced if stale."""
        changes = {"state": rules.check_state(state), "owner": "", "lease_until": 0.0}

        def run(tx: Tx) -> None:
            sql.owned_in(tx, session, epoch)
            sql.set_columns(tx, session, changes)

        await self._change(session, run)

    async def read(self, session: str, *, after: int = 0, to: int | None = None, limit: int = 1000) -> list[Entry]:
        """Return entries in order, lineage included, bodies resolved. `limit` is at most READ_MAX."""

        def run(tx: Tx) -> tuple[list[Row], range]:
            state = sql.load(tx, session)
            first, last = max(after, 0), state.row.head if to is None else min(to, state.row.head)
            count = max(0, min(limit, READ_MAX, last - first))
            return sql.entries_in(tx, state, first, last, count), range(first + 1, first + 1 + count)

        rows, wanted = await self._db.read(run)
        _check_whole(session, rows, wanted)
        return await self._resolve(rows)

    async def tail(self, session: str) -> list[Entry]:
        """Return what `messages()` needs, reading nothing of the past (see the contract)."""

        def run(tx: Tx) -> tuple[list[Row], list[Row], range]:
            state = sql.load(tx, session)
            plan = plan_tail(sql.marks_in(tx, state))
            system = [] if plan.system > plan.after else sql.entries_in(tx, state, plan.system - 1, plan.system, 1)
            count = state.row.head - plan.after
            wanted = range(plan.after + 1, state.row.head + 1)
            return system, sql.entries_in(tx, state, plan.after, state.row.head, count), wanted

        system, rows, wanted = await self._db.read(run)
        _check_whole(session, rows, wanted)
        return await self._resolve([*system, *rows])

    async def inbox_after(self, session: str, position: int) -> list[Entry]:
        """Return the inbox entries after a position."""
        rows = await self._db.read(lambda tx: sql.inbox_in(tx, sql.load(tx, session), max(position, 0)))
        return await self._resolve(rows)

    async def put_delta(self, session: str, epoch: int, delta: Delta) -> None:
        """Keep a piece of a streaming reply, relaxed durability."""
        rules.check_delta(delta)
        await self._change(session, lambda tx: sql.put_delta_in(tx, session, epoch, delta), durable=False)

    async def deltas(self, session: str) -> list[Delta]:
        """Return the pieces of replies that have no final entry yet."""
        return await self._db.read(lambda tx: sql.deltas_in(tx, session))

    async def fork(self, session: str, *, at: int | None = None, name: str = "", session_id: str = "") -> SessionRow:
        """Make a child that shares the parent's entries up to `at` (see the contract)."""
        child_id = session_id or new_id("ses")
        now = self._clock.wall_s()

        def run(tx: Tx) -> SessionRow:
            state = sql.load(tx, session)
            cut = rules.check_fork_point(state.row, at)
            turn, consumed = (
                (state.row.turn, state.row.consumed) if cut == state.row.head else sql.turn_at(tx, state, cut)
            )
            child = rules.child_of(state.row, child_id, name, cut, turn, consumed, now)
            return sql.insert_session(tx, child, lineage.clip(state.ranges, 0, cut))

        return await self._change(child_id, run)

    async def close(self, session: str, epoch: int | None = None) -> None:
        """End the session for good; reading stays possible."""
        await self._change(session, lambda tx: sql.close_in(tx, session, epoch))

    def ticket(self, session: str) -> int:
        """Return the session's present change number, for `wait` (see the contract)."""
        return self._hub.ticket(session)

    async def wait(self, session: str, after: int, timeout_s: float, *, ticket: int | None = None) -> bool:
        """Return True as soon as head > after or anything changes; False on timeout."""

        async def ready() -> bool:
            return (await self._db.read(lambda tx: sql.load(tx, session))).row.head > after

        return await self._hub.wait(session, ready, timeout_s, ticket)

    async def _change(self, session: str, fn: Callable[[Tx], T], *, durable: bool = True) -> T:
        def run(tx: Tx) -> T:
            value = fn(tx)
            tx.after_commit(lambda: self._hub.notify(session))
            return value

        return await self._db.write(run, durable=durable)

    async def _offload(self, packed: list[Packed]) -> list[Packed]:
        """Put the bodies that are too large for a row into the body store, before any row names them."""
        out = list(packed)
        for i, item in enumerate(packed):
            if rules.needs_blob(item):
                out[i] = replace(item, blob=await asyncio.to_thread(self._bodies.put, item.body))
        return out

    async def _resolve(self, rows: Sequence[Row]) -> list[Entry]:
        """Make entries of rows; in a thread if there are blobs to read or rows enough to hold the event loop up."""
        if len(rows) > 200 or any(row["blob"] for row in rows):
            return await asyncio.to_thread(self._entries, rows)
        return self._entries(rows)

    def _entries(self, rows: Sequence[Row]) -> list[Entry]:
        return [_entry(row, self._bodies) for row in rows]


def _entry(row: Row, bodies: BodyStore) -> Entry:
    session, position, kind, turn, ref, key, epoch, code_version, ts, schema, size, blob, text = row
    try:
        raw = bodies.get(str(blob), int(size)) if blob else text
        body = _BODY.decode(raw)
    except (msgspec.MsgspecError, TypeError, Corrupt) as exc:
        raise Corrupt(
            f"context log: entry {position} of session {session} is damaged: {exc}",
            hint="restore a backup, or fork the session before it",
            session=str(session),
            position=int(position),
        ) from exc
    return Entry(session, position, kind, body, turn, ref, key, epoch, code_version, ts, schema)


def _check_whole(session: str, rows: Sequence[Row], wanted: range) -> None:
    """Raise Corrupt if a position is missing: a log has no gaps."""
    if len(rows) == len(wanted):
        return
    have = {int(row["position"]) for row in rows}
    missing = next(position for position in wanted if position not in have)
    raise Corrupt(
        f"context log: entry {missing} of session {session} is missing",
        hint="restore a backup, or fork the session before it",
        session=session,
        position=missing,
    )
