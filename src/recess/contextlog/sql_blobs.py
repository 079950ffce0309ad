"""The rows of blobs: which entry of a log names which bytes. Functions over a `Tx`; the rules are in `blobs`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from recess.contextlog import lineage
from recess.contextlog.blobs import KEEP_S, LIST_MAX
from recess.contextlog.contract import Blob, Piece
from recess.contextlog.lineage import Range
from recess.db import Query, Row, Tx
from recess.errors import Corrupt

_PIECES = msgspec.json.Decoder(list[tuple[str, int]])
_COLUMNS = "session, position, hash, size, media_type, name, pieces"


def insert(session: str, position: int, body: bytes, pieces: Sequence[Piece]) -> Query:
    """Return the insert that goes with a blob's entry."""
    facts = msgspec.json.decode(body)
    held = msgspec.json.encode([(one.hash, one.size) for one in pieces]).decode()
    values = (session, position, facts["hash"], facts["size"], facts["media_type"], facts["name"], held, 0.0)
    return f"INSERT INTO log_blob ({_COLUMNS}, until) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values


def find_in(tx: Tx, ranges: Sequence[Range], digest: str = "", limit: int = LIST_MAX) -> list[Blob]:
    """Return the blobs that a log names, newest first; with `digest`, those of these bytes."""
    found: list[Blob] = []
    for part in reversed(ranges):
        which, params = (" AND hash = ?", (digest,)) if digest else ("", ())
        rows = tx.execute(
            f"SELECT {_COLUMNS} FROM log_blob WHERE session = ? AND position BETWEEN ? AND ?{which} "
            "ORDER BY position DESC LIMIT ?",
            (part.owner, part.first, part.last, *params, limit - len(found)),
        )
        found += [_blob(row) for row in rows]
        if len(found) >= limit:
            break
    return found


def held_in(tx: Tx, session: str) -> int:
    """Return the bytes of the blobs that a session put itself, each counted once for each of its entries."""
    row = tx.one("SELECT sum(size) AS held FROM log_blob WHERE session = ?", (session,))
    return int(row["held"] or 0) if row is not None else 0


def pieces_in(tx: Tx, session: str = "") -> dict[str, int]:
    """Return hash -> size of every piece that any row names (of a session's own rows, with `session`)."""
    which, params = (" WHERE session = ?", (session,)) if session else ("", ())
    rows = tx.execute(f"SELECT {_COLUMNS} FROM log_blob{which}", params)
    return {piece.hash: piece.size for row in rows for piece in _blob(row).pieces}


def expire_in(tx: Tx, now: float) -> int:
    """Take the rows of blobs whose time is over, note the time of those that nobody open reaches any more, and take the note
    back where somebody does. Returns how many rows went."""
    rows = tx.execute(
        "SELECT session, position, until FROM log_blob WHERE session IN (SELECT id FROM log_session WHERE state = 'closed')"
    )
    if not rows:
        return 0
    forks = tx.execute("SELECT lineage FROM log_session WHERE state <> 'closed' AND lineage <> '[]'")
    reached = _by_owner(part for fork in forks for part in lineage.decode(fork["lineage"]))
    taken = 0
    for row in rows:
        at, until, where = int(row["position"]), float(row["until"]), (row["session"], row["position"])
        wanted = any(part.first <= at <= part.last for part in reached.get(str(row["session"]), ()))
        if not wanted and until and until < now:
            tx.execute("DELETE FROM log_blob WHERE session = ? AND position = ?", where)
            taken += 1
        elif wanted == bool(until):  # a note to take back, or one to make
            noted = 0.0 if wanted else now + KEEP_S
            tx.execute("UPDATE log_blob SET until = ? WHERE session = ? AND position = ?", (noted, *where))
    return taken


def _by_owner(parts: Iterable[Range]) -> dict[str, list[Range]]:
    found: dict[str, list[Range]] = {}
    for part in parts:
        found.setdefault(part.owner, []).append(part)
    return found


def _blob(row: Row) -> Blob:
    try:
        pieces = tuple(Piece(digest, size) for digest, size in _PIECES.decode(row["pieces"]))
    except msgspec.MsgspecError as exc:
        raise Corrupt(
            f"context log: the blob of entry {row['position']} of session {row['session']} has an unreadable row: {exc}",
            hint="restore a backup",
            session=str(row["session"]),
            position=int(row["position"]),
        ) from exc
    return Blob(
        str(row["hash"]), int(row["size"]), str(row["media_type"]), str(row["name"]), str(row["session"]),
        int(row["position"]), pieces,
    )  # fmt: skip
