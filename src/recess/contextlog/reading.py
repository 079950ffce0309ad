"""From a plan to entries: rows and segments in order, large bodies fetched and verified, within a budget of bytes.

It blocks on stores, so async callers use a thread when `blocks` says so. It must know no database.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from recess.blobs import BlobStore
from recess.contextlog import segments
from recess.contextlog.bodies import BodyStore
from recess.contextlog.contract import Entry
from recess.contextlog.sql_read import Plan, Sealed
from recess.errors import Corrupt, IllegalState, NotFound

ROWS_INLINE = 200  # more of them would hold the event loop up

_BODY = msgspec.json.Decoder(dict[str, Any])


def blocks(plan: Plan) -> bool:
    """Tell whether reading this waits for a store, or is much work."""
    return len(plan) > ROWS_INLINE or any(isinstance(item, Sealed) or item["blob"] for item in plan)


def entries(plan: Plan, bodies: BodyStore, blobs: BlobStore | None, max_bytes: int | None = None) -> list[Entry]:
    """Return the plan's entries; with `max_bytes`, none beyond that many bytes of bodies except the first.

    Raises Corrupt naming the entry, Unavailable.
    """
    out: list[Entry] = []
    spent = 0
    for values in _values(plan, blobs):
        if max_bytes is not None and out and spent + int(values[10]) > max_bytes:
            break
        spent += int(values[10])
        out.append(_entry(values, bodies))
    return out


def check_whole(session: str, found: list[Entry], wanted: range, *, cut: bool) -> None:
    """Raise Corrupt if a position is missing: a log has no gaps. `cut`: the end may be left out."""
    for entry, position in zip(found, wanted, strict=False):
        if entry.position != position:
            raise missing(session, position)
    if len(found) < len(wanted) and not (cut and found):
        raise missing(session, wanted[len(found)])


def missing(session: str, position: int) -> Corrupt:
    """Return the error for an entry that is not there."""
    return Corrupt(
        f"context log: entry {position} of session {session} is missing",
        hint="restore a backup, or fork the session before it",
        session=session,
        position=position,
    )


def _values(plan: Plan, blobs: BlobStore | None) -> Iterator[tuple[Any, ...]]:
    for item in plan:
        if not isinstance(item, Sealed):
            yield tuple(item)
            continue
        if blobs is None:
            raise IllegalState("context log: this log was opened without the store of its segments")
        try:
            for raw in segments.read(blobs, item.segment, item.first, item.last):
                if item.only is None or raw[0] in item.only:
                    yield (item.segment.session, *raw)
        except (Corrupt, NotFound) as exc:
            raise Corrupt(
                f"context log: entries {item.segment.first} to {item.segment.last} of session {item.segment.session} "
                f"are damaged: {exc.message}",
                hint="restore the blob from a backup, or fork the session before them",
                session=item.segment.session,
                position=item.segment.first,
                last=item.segment.last,
            ) from exc


def _entry(values: tuple[Any, ...], bodies: BodyStore) -> Entry:
    session, position, kind, turn, ref, key, epoch, code_version, ts, schema, size, blob, text = values
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
