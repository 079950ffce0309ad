"""Whether a log is whole: every position there, every segment and large body what its hash says. It changes nothing.

`check` reads what the tables say of each other; with `deep` it reads every entry, segment and body, too. What it finds is told
as lines for people, as many as there are up to a limit: one damaged session must not hide another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from itertools import pairwise

from recess.contextlog import sql_blobs
from recess.contextlog import sql_read as plans
from recess.contextlog import sql_tx as sql
from recess.contextlog.contract import Piece
from recess.contextlog.lineage import Range
from recess.contextlog.sql import SqlLog
from recess.db import Tx
from recess.errors import RecessError

PAGE = 1000
PAGE_BYTES = 16 << 20


async def check(log: SqlLog, *, deep: bool = False) -> AsyncIterator[str]:
    """Yield what is wrong, a line each."""
    rows = await log.db.read(lambda tx: tx.execute("SELECT id FROM log_session ORDER BY seq"))
    sessions = [str(row["id"]) for row in rows]
    for session in sessions:
        try:
            problems = await log.db.read(partial(_session, session=session))
        except RecessError as exc:
            problems = [exc.message]
        for problem in problems:
            yield f"session {session}: {problem}"
        if deep and not problems:
            async for problem in _read_all(log, session):
                yield problem
            async for problem in _read_blobs(log, session):
                yield problem
    for table in ("log_entry", "log_key", "log_delta", "log_mark", "log_segment", "log_blob"):
        for orphan in await log.db.read(partial(_orphans, table=table)):
            yield f"{table} has rows of {orphan}, which is no session"


def _orphans(tx: Tx, table: str) -> list[str]:
    rows = tx.execute(f"SELECT DISTINCT session FROM {table} WHERE session NOT IN (SELECT id FROM log_session)")
    return [str(row["session"]) for row in rows]


def _session(tx: Tx, session: str) -> list[str]:
    state = sql.load(tx, session)
    row, problems = state.row, []
    own = Range(session, row.fork_position + 1, row.head)
    segments = plans.segments_in(tx, own)
    expected = row.fork_position
    for segment in segments:
        if segment.first != expected + 1:
            problems.append(f"its segments do not follow each other at {expected + 1}")
        expected = segment.last
    if segments and expected != state.sealed:
        problems.append(f"its row says that {state.sealed} is sealed, its segments end at {expected}")
    hot = tx.one(
        "SELECT count(*) AS n, min(position) AS low, max(position) AS high FROM log_entry WHERE session = ?", (session,)
    )
    count, low, high = (int(hot[i] or 0) for i in range(3)) if hot else (0, 0, 0)
    wanted = row.head - max(expected, row.fork_position)
    if count != wanted or (count and (low, high) != (row.head - count + 1, row.head)):
        problems.append(f"{count} entries are in rows ({low} to {high}), and {wanted} should be, up to {row.head}")
    late = tx.one("SELECT max(position) AS high FROM log_key WHERE session = ?", (session,))
    if late is not None and int(late["high"] or 0) > row.head:
        problems.append(f"a key names position {late['high']}, beyond its end {row.head}")
    ranges = state.inherited
    if any(b.first != a.last + 1 for a, b in pairwise(ranges)) or (ranges and ranges[-1].last != row.fork_position):
        problems.append("what it inherited does not lead up to where it was forked")
    for part in ranges:
        owner = tx.one("SELECT head FROM log_session WHERE id = ?", (part.owner,))
        if owner is None or int(owner["head"]) < part.last:
            problems.append(f"it inherited entries up to {part.last} of {part.owner}, which has not so many")
    return problems


async def _read_all(log: SqlLog, session: str) -> AsyncIterator[str]:
    """Read a session's own entries; what cannot be read is told once and passed over."""
    row = await log.get(session)
    at = row.fork_position
    while at < row.head:
        try:
            page = await log.read(session, after=at, limit=PAGE, max_bytes=PAGE_BYTES)
            at = page[-1].position
        except RecessError as exc:
            yield exc.message
            at = max(at + 1, int(exc.details.get("last") or exc.details.get("position") or 0))


async def _read_blobs(log: SqlLog, session: str) -> AsyncIterator[str]:
    """Read the pieces of the blobs that a session put itself."""
    pieces = await log.db.read(lambda tx: sql_blobs.pieces_in(tx, session))
    for digest, size in pieces.items():
        try:
            await log.get_piece(Piece(digest, size))
        except RecessError as exc:
            yield f"session {session}: a piece of a blob: {exc.message}"
