"""The context log over a `Database`, SQLite or Postgres. One method, one transaction (`sql_tx`).

Crash safety: a method's effects are in one transaction, durable when it returns (deltas: relaxed). A large body is durable
in the body store before the row that names it. Waiters are woken after the commit, on the caller's event loop, even if the
caller was cancelled meanwhile; those on other nodes by a word (`Tx.notify`) that may be lost, so they look again by
themselves now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from recess.blobs import BlobStore
from recess.clock import Clock, SystemClock
from recess.contextlog import lineage, reading, rules, sql_blobs
from recess.contextlog import sql_read as plans
from recess.contextlog import sql_tx as sql
from recess.contextlog.bodies import BodyStore
from recess.contextlog.branch import plan_tail
from recess.contextlog.contract import Appended, Blob, Born, Delta, Draft, Entry, Piece, SessionRow
from recess.contextlog.rules import Packed
from recess.contextlog.sql_read import Plan
from recess.contextlog.sql_tx import freeze_in
from recess.contextlog.wake import WakeHub
from recess.db import POSTGRES, SHARED, Database, Tx
from recess.ids import new_id

__all__ = ["SqlLog", "freeze_in"]

T = TypeVar("T")

READ_MAX = 10_000
LOOK_AGAIN_S = 5.0  # who waits for a log that other nodes write too looks at least so often
_BACK = 64  # entries at once, when the newest beginning of a turn is looked for


class SqlLog:
    """`ContextLog` on a database, opened with `recess.contextlog.SCHEMA`. `bodies` keeps bodies over 16 KiB, `blobs` the
    segments (without one, nothing may be sealed)."""

    def __init__(
        self, db: Database, bodies: BodyStore, clock: Clock | None = None, *, blobs: BlobStore | None = None
    ) -> None:
        self.db = db
        self.bodies = bodies
        self.blobs = blobs
        self._clock = clock or SystemClock()
        self._hub = WakeHub(self._clock)
        self._watchers: list[Callable[[str], None]] = []
        self._appended: Callable[[str, int], None] | None = None
        db.listen(self._heard)

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
        return await self.db.read(lambda tx: sql.find(tx, ref))

    async def list_sessions(self, *, states: Sequence[str] = (), limit: int = 1000) -> list[SessionRow]:
        """Return newest first."""
        return await self.db.read(lambda tx: sql.list_rows(tx, states, limit))

    async def claim(self, session: str, owner: str, lease_s: float, *, now: float, force: bool = False) -> SessionRow:
        """Take the lease, raise the epoch (see the contract)."""
        return await self._change(
            session, lambda tx: sql.claim_in(tx, session, owner, now + lease_s, now=now, force=force)
        )

    async def claim_abandoned(self, owner: str, lease_s: float, *, now: float, limit: int = 16) -> list[SessionRow]:
        """Take leases that have ended (see the contract)."""

        def run(tx: Tx) -> list[SessionRow]:
            taken = sql.claim_abandoned_in(tx, owner, now + lease_s, now=now, limit=limit)
            for row in taken:
                self._announce(tx, row.id)
            return taken

        return await self.db.write(run, locks=())  # the rows' own locks are all it needs, and it waits for none

    async def renew(self, session: str, epoch: int, lease_s: float, *, now: float) -> None:
        """Extend the lease; Fenced if the epoch is stale. Wakes nobody."""

        def run(tx: Tx) -> None:
            sql.owned_in(tx, session, epoch)
            sql.set_columns(tx, session, {"lease_until": now + lease_s})

        await self.db.write(run, locks=(session,), ahead=sql.ahead(self.db.dialect, session))

    async def append(self, session: str, epoch: int, drafts: Sequence[Draft]) -> list[Appended]:
        """Owner append, all or nothing (see the contract)."""
        packed = await self._offload(rules.pack_all(drafts))
        ts = self._clock.wall_s()
        return await self._append(session, packed, lambda tx: sql.append_in(tx, session, epoch, packed, ts=ts))

    async def append_inbox(self, session: str, draft: Draft) -> Appended:
        """Inbox append (see the contract)."""
        packed = (await self._offload([rules.pack(draft, inbox=True)]))[0]
        ts = self._clock.wall_s()
        done = await self._append(
            session, [packed], lambda tx: [sql.append_inbox_in(tx, session, packed, ts=ts)]
        )  # fmt: skip
        return done[0]

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

        return await self._change(session, run, locks=(session,) if also is None else (session, *SHARED))

    async def release(self, session: str, epoch: int, *, state: str) -> None:
        """Give the lease back with this state; Fenced if stale."""
        changes = {"state": rules.check_state(state), "owner": "", "lease_until": 0.0}

        def run(tx: Tx) -> None:
            sql.owned_in(tx, session, epoch)
            sql.set_columns(tx, session, changes)

        await self._change(session, run)

    async def read(
        self, session: str, *, after: int = 0, to: int | None = None, limit: int = 1000, max_bytes: int | None = None
    ) -> list[Entry]:
        """Return entries in order, lineage included, bodies resolved (see the contract). `limit` is at most READ_MAX."""

        def run(tx: Tx) -> tuple[Plan, range]:
            state = sql.load(tx, session)
            first, last = max(after, 0), state.row.head if to is None else min(to, state.row.head)
            last = min(last, first + max(0, min(limit, READ_MAX)))
            return plans.entries_in(tx, state, first, last, max_bytes), range(first + 1, last + 1)

        plan, wanted = await self.db.read(run)
        found = await self._entries(plan, max_bytes)
        reading.check_whole(session, found, wanted, cut=max_bytes is not None)
        return found

    async def tail(self, session: str, *, limit: int | None = None) -> list[Entry]:
        """Return what `messages()` needs, reading nothing of the past (see the contract)."""

        def run(tx: Tx) -> tuple[Plan, Plan, range]:
            state = sql.load(tx, session)
            plan = plan_tail(plans.marks_in(tx, state))
            system = [] if plan.system > plan.after else plans.entries_in(tx, state, plan.system - 1, plan.system)
            last = state.row.head if limit is None else min(state.row.head, plan.after + limit)
            return system, plans.entries_in(tx, state, plan.after, last), range(plan.after + 1, last + 1)

        system, rows, wanted = await self.db.read(run)
        found = await self._entries([*system, *rows])
        reading.check_whole(session, found[len(found) - len(wanted) :] if system else found, wanted, cut=False)
        return found

    async def inbox_after(self, session: str, position: int) -> list[Entry]:
        """Return the inbox entries after a position."""
        plan = await self.db.read(lambda tx: plans.inbox_in(tx, sql.load(tx, session), max(position, 0)))
        return await self._entries(plan)

    async def put_delta(self, session: str, epoch: int, delta: Delta) -> None:
        """Keep a piece of a streaming reply, relaxed durability."""
        rules.check_delta(delta)
        await self._change(session, lambda tx: sql.put_delta_in(tx, session, epoch, delta), durable=False)

    async def deltas(self, session: str) -> list[Delta]:
        """Return the pieces of replies that have no final entry yet."""
        return await self.db.read(lambda tx: sql.deltas_in(tx, session))

    async def put_piece(self, data: bytes) -> Piece:
        """Keep some bytes of a blob (see the contract)."""
        return Piece(await asyncio.to_thread(self.bodies.put, data), len(data))

    async def get_piece(self, piece: Piece) -> bytes:
        """Return the bytes of a piece (see the contract)."""
        return await asyncio.to_thread(self.bodies.get, piece.hash, piece.size)

    async def find_blobs(self, session: str, digest: str = "") -> list[Blob]:
        """Return the blobs that a session's log names (see the contract)."""
        return await self.db.read(lambda tx: sql_blobs.find_in(tx, sql.load(tx, session).ranges, digest))

    async def blob_bytes(self, session: str) -> int:
        """Return how many bytes of blobs a session has put itself."""
        return await self.db.read(lambda tx: sql_blobs.held_in(tx, session))

    async def fork(
        self, session: str, *, at: int | None = None, name: str = "", session_id: str = "", born: Born | None = None
    ) -> SessionRow:
        """Make a child that shares the parent's entries up to `at` (see the contract)."""
        child_id = session_id or new_id("ses")
        ts = self._clock.wall_s()
        if born is not None and at is None:
            at = (await self.get(session)).head
        # Before the transaction, which must not wait for a store: what is in the log up to `at` never changes.
        then = (0, 0) if at is None else await self._turn_at(session, at)
        first = await self._offload(rules.pack_all([born.first] if born is not None else []))

        def run(tx: Tx) -> SessionRow:
            state = sql.load(tx, session)
            cut = rules.check_fork_point(state.row, at)
            at_head = born is None and cut == state.row.head
            turn, consumed = (state.row.turn, state.row.consumed) if at_head else then
            child = rules.child_of(state.row, child_id, name, cut, turn, consumed, ts)
            inherited = lineage.clip(state.ranges, 0, cut)
            if born is None:
                return sql.insert_session(tx, child, inherited)
            return sql.insert_with(tx, rules.born_as(child, born), inherited, first, ts=ts)

        child = await self._change(child_id, run)
        if self._appended is not None and first:
            self._appended(child.id, len(first))
        return child

    async def _turn_at(self, session: str, at: int) -> tuple[int, int]:
        """Return (turn, consumed) as they were when `at` was the head, read from the newest turn.start up to there."""
        row = (await self.db.read(lambda tx: sql.load(tx, session))).row
        low = rules.check_fork_point(row, at)
        while low > 0:
            first = max(0, low - _BACK)
            for entry in reversed(await self.read(session, after=first, to=low, limit=_BACK)):
                if entry.kind == "turn.start":
                    inbox = entry.body.get("inbox")
                    return entry.turn, min(inbox if isinstance(inbox, int) else row.consumed, at)
            low = first
        return 0, 0

    async def close(self, session: str, epoch: int | None = None) -> None:
        """End the session for good; reading stays possible."""
        await self._change(session, lambda tx: sql.close_in(tx, session, epoch))

    def ticket(self, session: str) -> int:
        """Return the session's present change number, for `wait` (see the contract)."""
        return self._hub.ticket(session)

    async def wait(self, session: str, after: int, timeout_s: float, *, ticket: int | None = None) -> bool:
        """Return True as soon as head > after or anything changes; False on timeout."""

        async def ready() -> bool:
            return (await self.db.read(lambda tx: sql.load(tx, session))).row.head > after

        if self.db.dialect != POSTGRES:
            return await self._hub.wait(session, ready, timeout_s, ticket)
        seen, end = self._hub.ticket(session) if ticket is None else ticket, self._clock.monotonic_s() + timeout_s
        while True:
            left = end - self._clock.monotonic_s()
            if await self._hub.wait(session, ready, min(left, LOOK_AGAIN_S), seen):
                return True
            if left <= LOOK_AGAIN_S:
                return False

    # --- other nodes, and whoever keeps the log in order

    def watch(self, changed: Callable[[str], None]) -> None:
        """Call `changed` with the id of each session that another node changed, and with "" when some may have been
        missed. From any thread."""
        self._watchers.append(changed)

    def on_append(self, appended: Callable[[str, int], None]) -> None:
        """Call this with a session and a number of entries after each append made here, on the event loop of who appended."""
        self._appended = appended

    def _heard(self, session: str) -> None:
        if session:
            self._hub.notify(session)
        else:
            self._hub.notify_all()
        for watcher in self._watchers:
            watcher(session)

    def _announce(self, tx: Tx, session: str) -> None:
        tx.after_commit(lambda: self._hub.notify(session))
        tx.notify(session)

    async def _change(
        self,
        session: str,
        fn: Callable[[Tx], T],
        *,
        durable: bool = True,
        locks: Sequence[str] = (),
        packed: Sequence[Packed] = (),
    ) -> T:
        def run(tx: Tx) -> T:
            value = fn(tx)
            self._announce(tx, session)
            return value

        ahead = sql.ahead(self.db.dialect, session, packed)
        return await self.db.write(run, durable=durable, locks=locks or (session,), ahead=ahead)

    async def _append(
        self, session: str, packed: Sequence[Packed], fn: Callable[[Tx], list[Appended]]
    ) -> list[Appended]:
        done = await self._change(session, fn, packed=packed)
        if self._appended is not None and done:
            self._appended(session, len(done))
        return done

    async def _offload(self, packed: list[Packed]) -> list[Packed]:
        """Put the bodies that are too large for a row into the body store, before any row names them."""
        out = list(packed)
        for i, item in enumerate(packed):
            if rules.needs_blob(item):
                out[i] = replace(item, blob=await asyncio.to_thread(self.bodies.put, item.body))
        return out

    async def _entries(self, plan: Plan, max_bytes: int | None = None) -> list[Entry]:
        if reading.blocks(plan):
            return await asyncio.to_thread(reading.entries, plan, self.bodies, self.blobs, max_bytes)
        return reading.entries(plan, self.bodies, self.blobs, max_bytes)
