"""Keeping the log's tables small: old rows are sealed into segments, and what no row names any more is removed.

A session is looked at when it has grown by a segment's worth since it was looked at last, and once after each start. No lease is
needed: entries never change, so who seals them does not matter; two at once make two blobs, of which one is named. Each has a
name of its own, so that a sweep of what was left never meets one that is about to be named.

Crash safety: the segment's blob is durable before the one transaction that names it and removes the rows. A crash in
between leaves a blob that no row names, which the sweep removes when it is older than the grace period; by then whoever
was about to name it has done so or is gone. The same holds for large bodies and the rows that name them.

It must know nothing of what entries mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from recess.blobs import BlobStore
from recess.clock import Clock, SystemClock
from recess.contextlog import rules, segments, sql_blobs
from recess.contextlog import sql_tx as sql
from recess.contextlog.contract import INBOX_KINDS
from recess.contextlog.segments import Built
from recess.contextlog.sql import SqlLog
from recess.crashpoints import crash_point
from recess.db import Database, Row, Tx
from recess.errors import IllegalState, RecessError
from recess.frames import WorkPool
from recess.ids import new_id

log = logging.getLogger(__name__)

GRACE_S = 86_400.0
_ROWS_AT_ONCE = 256
_TRACKED_MAX = 65_536


@dataclass(frozen=True)
class Sealing:
    """When to seal: a segment holds `entries`, or `max_bytes` of bodies if that is less; the newest `keep` stay rows. A
    closed session is sealed to its end if it has at least `closed_min` rows: fewer are not worth a blob."""

    entries: int = 1000
    max_bytes: int = 1 << 20
    keep: int = 256
    closed_min: int = 128


@dataclass(frozen=True)
class Swept:
    """What a sweep removed."""

    segments: int = 0
    bodies: int = 0
    freed_bytes: int = 0


class LogKeeper:
    """Seals and sweeps one log. `run` until cancelled; `close` afterwards."""

    def __init__(self, log: SqlLog, clock: Clock | None = None, *, sealing: Sealing | None = None) -> None:
        if log.blobs is None:
            raise IllegalState("a log without a store for its segments cannot be sealed")
        self._log = log
        self._blobs: BlobStore = log.blobs
        self._clock = clock or SystemClock()
        self._sealing = sealing or Sealing()
        self._pool = WorkPool(1, "log-seal")
        self._grown: dict[str, int] = {}  # session -> entries appended since it was looked at
        self._due: asyncio.Queue[str] = asyncio.Queue()
        self._identity = ""
        log.on_append(self._appended)

    async def run(self) -> None:
        """Seal what is due, for ever. A failure (the store is down) is logged; the session is looked at again later."""
        try:
            for session in await self.due():
                self._due.put_nowait(session)
        except RecessError as exc:
            log.warning("what is to be sealed was not looked for: %s", exc.message)
        while True:
            session = await self._due.get()
            try:
                await self.seal(session)
            except RecessError as exc:
                log.warning("session %s is not sealed: %s", session, exc.message)

    def close(self) -> None:
        """End its thread."""
        self._pool.close()

    def _appended(self, session: str, entries: int) -> None:
        grown = self._grown.get(session, 0) + entries
        if grown >= self._sealing.entries:
            self._grown.pop(session, None)
            self._due.put_nowait(session)
            return
        if len(self._grown) >= _TRACKED_MAX:
            self._grown.clear()  # they are found by `due` after the next start, if not before
        self._grown[session] = grown

    async def due(self) -> list[str]:
        """Return the sessions with rows enough for a segment."""
        most = self._sealing.entries + self._sealing.keep
        own = "head - CASE WHEN sealed > fork_position THEN sealed ELSE fork_position END"
        sql_text = f"SELECT id FROM log_session WHERE {own} >= ? OR (state = ? AND {own} >= ?)"
        params = (most, rules.CLOSED, self._sealing.closed_min)
        return [str(row["id"]) for row in await self._log.db.read(lambda tx: tx.execute(sql_text, params))]

    # --- sealing

    async def seal(self, session: str) -> int:
        """Seal what may be sealed of a session; return how many segments that made. May be called at any time."""
        made = 0
        while rows := await self._log.db.read(lambda tx: self._ripe(tx, session)):
            built = await asyncio.to_thread(self._build, await self.identity(), session, rows)
            await asyncio.to_thread(self._blobs.put, built.segment.key, built.file.pieces)
            crash_point("log.before_segment_row")
            if not await self._log.db.write(partial(_index, built=built, now=self._clock.wall_s()), locks=(session,)):
                break  # another one was quicker
            crash_point("log.after_segment_row")
            made += 1
        return made

    def _ripe(self, tx: Tx, session: str) -> list[Row]:
        """Return the oldest rows of a session if they are a segment's worth, else []."""
        state, limits = sql.load(tx, session), self._sealing
        closed = state.row.state == rules.CLOSED
        after = max(state.sealed, state.row.fork_position)
        last = state.row.head - (0 if closed else limits.keep)
        rows: list[Row] = []
        held = 0
        while len(rows) < limits.entries and held < limits.max_bytes:
            more = tx.execute(
                f"SELECT {sql.ENTRY} FROM log_entry WHERE session = ? AND position BETWEEN ? AND ? ORDER BY position LIMIT ?",
                (session, after + len(rows) + 1, last, min(_ROWS_AT_ONCE, limits.entries - len(rows))),
            )
            rows += more
            held += sum(len(row["body"] or "") for row in more)
            if len(more) < min(_ROWS_AT_ONCE, limits.entries):
                break
        full = len(rows) >= limits.entries or held >= limits.max_bytes
        return rows if full or (closed and state.row.head - after >= limits.closed_min) else []

    def _build(self, identity: str, session: str, rows: Sequence[Row]) -> Built:
        return segments.build(identity, session, rows, INBOX_KINDS, self._pool)

    async def identity(self) -> str:
        """Return this log's name in stores."""
        if not self._identity:
            self._identity = await identity_of(self._log.db, self._clock.wall_s())
        return self._identity

    # --- sweeping

    async def sweep(self, *, grace_s: float = GRACE_S) -> Swept:
        """Remove segments and large bodies that no row names and that are older than the grace period, and the rows of blobs
        that nobody open has had for long enough: the bytes of those go in this round too, if they are as old as that."""
        now = self._clock.wall_s()
        before_s = now - grace_s
        await self._log.db.write(lambda tx: sql_blobs.expire_in(tx, now))
        folder = f"{segments.FOLDER}/{await self.identity()}/"
        # First what is there, then what is named: what is named meanwhile was there, and is seen.
        found = await asyncio.to_thread(lambda: list(self._blobs.list_blobs(folder)))
        bodies = await asyncio.to_thread(lambda: list(self._log.bodies.older_than(before_s)))
        keys, hashes = await self._log.db.read(_named)
        dead = [info for info in found if info.key not in keys and info.modified_s < before_s]
        freed = sum(info.size_bytes for info in dead)
        for info in dead:
            await asyncio.to_thread(self._blobs.delete, info.key)
        gone = 0
        for digest, size in bodies:
            if digest not in hashes and await asyncio.to_thread(self._log.bodies.drop, digest, before_s):
                gone, freed = gone + 1, freed + size
        return Swept(len(dead), gone, freed)


async def identity_of(db: Database, now: float) -> str:
    """Return the name of this database's log in stores that it may share with others, made at the first call."""

    def run(tx: Tx) -> str:
        tx.execute(
            "INSERT INTO log_identity (one, id, made) VALUES (1, ?, ?) ON CONFLICT DO NOTHING", (new_id("log"), now)
        )
        row = tx.one("SELECT id FROM log_identity WHERE one = 1")
        return str(row["id"]) if row else ""

    return await db.write(run)


def _index(tx: Tx, built: Built, now: float) -> bool:
    """Put a segment in the place of its rows; False if they are not the oldest rows any more."""
    one = built.segment
    state = sql.load(tx, one.session)
    if max(state.sealed, state.row.fork_position) != one.first - 1:
        return False
    tx.execute(
        "INSERT INTO log_segment (session, first, last, key, hash, size, created, inbox, bodies) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (one.session, one.first, one.last, one.key, one.hash, one.size, now, _json(built.inbox), _json(built.bodies)),
    )
    tx.execute(
        "DELETE FROM log_entry WHERE session = ? AND position BETWEEN ? AND ?", (one.session, one.first, one.last)
    )
    tx.execute("UPDATE log_session SET sealed = ? WHERE id = ?", (one.last, one.session))
    return True


def _named(tx: Tx) -> tuple[set[str], set[str]]:
    """Return the keys of all segments, and the hashes of all large bodies, that the tables name."""
    rows = tx.execute("SELECT key, bodies FROM log_segment")
    hashes = {digest for row in rows for digest in msgspec.json.decode(row["bodies"], type=list[str])}
    hashes.update(str(row["blob"]) for row in tx.execute("SELECT DISTINCT blob FROM log_entry WHERE blob <> ''"))
    hashes.update(sql_blobs.pieces_in(tx))
    return {str(row["key"]) for row in rows}, hashes


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
