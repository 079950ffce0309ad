"""The log's decisions as pure functions: what may be appended, by whom, under which position; who may claim.

Both implementations call these, so that they cannot disagree. This module must know no storage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import msgspec
from blake3 import blake3

from recess.catalog.names import check_name
from recess.contextlog import blobs
from recess.contextlog.contract import (
    INBOX_BYTES_MAX,
    INBOX_KINDS,
    INLINE_BYTES_MAX,
    Appended,
    Born,
    Delta,
    Draft,
    Piece,
    SessionRow,
)
from recess.errors import BadInput, Fenced, IllegalState, KeyReused

CLOSED = "closed"
COLD = "cold"
FROZEN = "frozen"

DRAFTS_MAX = 1000  # entries in one append
WORD_CHARS_MAX = 256  # a ref or a key
DELTA_CHARS_MAX = 1 << 20
NUMBER_MAX = 1 << 53  # turns, parts: what JSON carries exactly
MARK_KINDS = frozenset({"system", "compact", "rewind"})  # what the reading of a tail must find without reading the past

_KIND = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*")
_KIND_CHARS_MAX = 64
_ID = re.compile(r"ses_[0-9a-z]{1,64}")
_UPDATABLE: Mapping[str, type] = {
    "state": str, "consumed": int, "snapshot": str, "snapshot_position": int, "code_version": str, "turn": int,
    "attempts": int, "meta": dict, "labels": dict, "name": str,
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A checked draft: `body` as canonical JSON, or in the blob `blob` when it is over INLINE_BYTES_MAX.

    `digest` is BLAKE3 (16 bytes) over kind, turn, ref, schema and body: what "the same content" means. `mark` is what
    a tail reading needs: the `to` of compact and rewind, 0 for system, None for all others.
    """

    kind: str
    turn: int
    ref: str
    key: str
    schema: int
    body: bytes
    digest: bytes
    mark: int | None
    part: int
    blob: str = ""
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Placed:
    """A packed draft with the position it gets, or had already (`replayed`)."""

    packed: Packed
    position: int
    replayed: bool

    @property
    def appended(self) -> Appended:
        """The outcome the caller sees."""
        return Appended(self.position, self.replayed)


def pack(draft: Draft, *, inbox: bool) -> Packed:
    """Check a draft and make its body canonical. Raises BadInput."""
    if len(draft.kind) > _KIND_CHARS_MAX or _KIND.fullmatch(draft.kind) is None:
        raise BadInput(f"not an entry kind: {draft.kind[:_KIND_CHARS_MAX]!r}")
    if inbox != (draft.kind in INBOX_KINDS):
        who = "clients" if inbox else "the session's owner"
        raise BadInput(f"{who} may not append {draft.kind!r} entries", hint=f"inbox kinds: {sorted(INBOX_KINDS)}")
    if inbox and not draft.key:
        raise BadInput("an inbox entry needs a key", hint="send an Idempotency-Key, new for each message")
    for name, word in (("ref", draft.ref), ("key", draft.key)):
        if len(word) > WORD_CHARS_MAX or not _is_text(word) or "\x00" in word:
            raise BadInput(f"the {name} of an entry is at most {WORD_CHARS_MAX} characters of text")
    if not 0 <= draft.turn <= NUMBER_MAX or not 1 <= draft.schema <= NUMBER_MAX:
        raise BadInput(f"an entry's turn and schema are small numbers, not {draft.turn} and {draft.schema}")
    body = encode_object(draft.body, f"the body of {draft.kind!r}")
    blobs.check(draft.kind, draft.body, draft.pieces)
    if inbox and len(body) > INBOX_BYTES_MAX:
        raise BadInput(
            f"{draft.kind!r}: {len(body)} bytes, more than {INBOX_BYTES_MAX}", hint="send it as a file: recess cp"
        )
    head = f"{draft.kind}\x00{draft.turn}\x00{draft.ref}\x00{draft.schema}\x00".encode()
    digest = blake3(head + body).digest(length=16)
    return Packed(
        draft.kind, draft.turn, draft.ref, draft.key, draft.schema, body, digest, _mark(draft), _part(draft),
        pieces=draft.pieces,
    )  # fmt: skip


def pack_all(drafts: Sequence[Draft]) -> list[Packed]:
    """Pack the drafts of one owner append. Raises BadInput."""
    if len(drafts) > DRAFTS_MAX:
        raise BadInput(f"at most {DRAFTS_MAX} entries in one append, not {len(drafts)}")
    return [pack(draft, inbox=False) for draft in drafts]


def needs_blob(packed: Packed) -> bool:
    """Tell whether the body is too large for a row."""
    return len(packed.body) > INLINE_BYTES_MAX


def place(packed: Sequence[Packed], head: int, known: Callable[[str], tuple[int, bytes] | None]) -> list[Placed]:
    """Give each its position after `head`; `known` tells position and digest of a key. Raises KeyReused, BadInput."""
    placed: list[Placed] = []
    fresh: dict[str, tuple[int, bytes]] = {}
    for item in packed:
        old = (fresh.get(item.key) or known(item.key)) if item.key else None
        if old is not None:
            if old[1] != item.digest:
                raise KeyReused(
                    f"the key {item.key!r} was used for other content (position {old[0]})",
                    hint="use a new key for new content",
                    position=old[0],
                )
            placed.append(Placed(item, old[0], replayed=True))
            continue
        head += 1
        if item.mark is not None and item.mark >= head:
            raise BadInput(f"{item.kind}: `to` is {item.mark}, but the entry itself is {head}")
        placed.append(Placed(item, head, replayed=False))
        if item.key:
            fresh[item.key] = (head, item.digest)
    return placed


def new_session(
    session: str,
    agent: str,
    code_version: str,
    name: str,
    labels: Mapping[str, str],
    meta: Mapping[str, Any],
    now: float,
) -> SessionRow:
    """Return the row of a session that begins: state "cold", epoch 0, nobody's. Raises BadInput."""
    if name:
        check_name(name, "session")
    if not _ID.fullmatch(session):
        raise BadInput(f"not a session id: {session[:64]!r}")
    plain = check_changes({"labels": labels, "meta": meta, "code_version": code_version})
    return SessionRow(
        id=session, name=name, agent=agent, code_version=code_version, state=COLD, head=0, consumed=0, epoch=0,
        owner="", lease_until=0.0, parent="", fork_position=0, snapshot="", snapshot_position=0, turn=0, attempts=0,
        created=now, labels=plain["labels"], meta=plain["meta"],
    )  # fmt: skip


def check_fork_point(row: SessionRow, at: int | None) -> int:
    """Return the position to fork at (the head without). Raises BadInput if the log has no such position."""
    cut = row.head if at is None else at
    if not 0 <= cut <= row.head:
        raise BadInput(f"session {row.id} cannot be forked at {cut}: its log ends at {row.head}")
    return cut


def child_of(parent: SessionRow, session: str, name: str, at: int, turn: int, consumed: int, now: float) -> SessionRow:
    """Return the row of a fork: the parent's agent, code and labels; no lease, no meta (that names the parent's machine).

    The parent's snapshot is the child's too if it is not newer than `at`.
    """
    row = new_session(session, parent.agent, parent.code_version, name, parent.labels, {}, now)
    snapshot = (parent.snapshot, parent.snapshot_position) if parent.snapshot_position <= at else ("", 0)
    return replace(
        row, head=at, consumed=min(consumed, at), parent=parent.id, fork_position=at, turn=turn,
        snapshot=snapshot[0], snapshot_position=snapshot[1],
    )  # fmt: skip


def born_as(child: SessionRow, born: Born) -> SessionRow:
    """Return a fork's row with what it begins with. Raises BadInput."""
    plain = check_changes({"state": born.state, "code_version": born.code_version, "meta": born.meta})
    return replace(
        child, epoch=1, consumed=child.fork_position, snapshot=born.snapshot, snapshot_position=born.snapshot_position,
        **plain,
    )  # fmt: skip


def abandoned(row: SessionRow, now: float) -> bool:
    """Tell whether a session's owner has let its lease end."""
    return bool(row.owner) and row.lease_until < now and row.state != CLOSED


def check_owner(row: SessionRow, epoch: int) -> None:
    """Raise Fenced unless the session is owned under this very epoch."""
    if row.epoch != epoch or not row.owner:
        why = "is closed" if row.state == CLOSED else f"is at epoch {row.epoch}{'' if row.owner else ', unowned'}"
        raise Fenced(
            f"session {row.id} {why}: epoch {epoch} may not write", hint="stop the machine", session=row.id, epoch=epoch
        )


def check_claim(row: SessionRow, owner: str, now: float, *, force: bool) -> None:
    """Raise IllegalState unless `owner` may take the lease now (see the contract)."""
    if row.state == CLOSED:
        raise IllegalState(f"session {row.id} is closed", session=row.id)
    if not owner:
        raise BadInput("an owner has a name")
    if row.owner and row.owner != owner and row.lease_until > now and not force:
        raise IllegalState(
            f"session {row.id} is owned by {row.owner} for another {row.lease_until - now:.1f} s",
            hint="wait for the lease to end",
            session=row.id,
            owner=row.owner,
        )


def check_open(row: SessionRow) -> None:
    """Raise IllegalState if the session is closed."""
    if row.state == CLOSED:
        raise IllegalState(f"session {row.id} is closed", hint="start a new one, or fork it", session=row.id)


def check_state(state: str) -> str:
    """Return a state that may be written; "closed" is only written by `close`. Raises BadInput."""
    if not state or len(state) > _KIND_CHARS_MAX or state == CLOSED:
        raise BadInput(f"not a state to set: {state[:_KIND_CHARS_MAX]!r}", hint="a session is ended by closing it")
    return state


def check_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of an `update`, JSON columns as plain dicts. Raises BadInput."""
    out: dict[str, Any] = {}
    for name, value in changes.items():
        kind = _UPDATABLE.get(name)
        if kind is None:
            raise BadInput(f"a session has no column {name!r} to change", hint=f"there are {', '.join(_UPDATABLE)}")
        if kind is dict and isinstance(value, Mapping):
            value = msgspec.json.decode(encode_object(value, name))
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadInput(f"session column {name!r} is not a {type(value).__name__}")
        if isinstance(value, int) and not 0 <= value <= NUMBER_MAX:
            raise BadInput(f"session column {name!r} cannot be {value}")
        if name == "name" and value:
            check_name(str(value), "session")
        out[name] = check_state(str(value)) if name == "state" else value
    return out


def check_delta(delta: Delta) -> None:
    """Raise BadInput for a delta with numbers out of range or too much text."""
    if min(delta.turn, delta.part, delta.n) < 0 or max(delta.turn, delta.part, delta.n) > NUMBER_MAX:
        raise BadInput(f"a delta's numbers are small: turn {delta.turn}, part {delta.part}, n {delta.n}")
    if len(delta.text) > DELTA_CHARS_MAX or not _is_text(delta.text):
        raise BadInput(f"a delta is at most {DELTA_CHARS_MAX} characters of text")


def ends_deltas(packed: Packed) -> tuple[int, int | None] | None:
    """Return which deltas this entry makes obsolete: (turn, part), (turn, None) for the whole turn, or None."""
    if packed.kind == "assistant":
        return (packed.turn, packed.part)
    if packed.kind in ("turn.end", "turn.cut"):
        return (packed.turn, None)
    return None


def encode_object(value: Mapping[str, Any], what: str) -> bytes:
    """Return a JSON object in canonical form (sorted keys, no spaces, UTF-8). Raises BadInput."""
    try:
        plain = value if isinstance(value, dict) else dict(value)
        return msgspec.json.encode(plain, enc_hook=_refuse, order="deterministic")
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadInput(f"{what} is not a JSON object: {exc}") from exc


def _refuse(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    raise TypeError(f"{type(value).__name__} is not JSON data")


def _mark(draft: Draft) -> int | None:
    if draft.kind not in MARK_KINDS:
        return None
    if draft.kind == "system":
        return 0
    to = draft.body.get("to")
    if not isinstance(to, int) or isinstance(to, bool) or to < 0:
        raise BadInput(f"{draft.kind}: `to` is a log position, not {to!r}")
    return to


def _part(draft: Draft) -> int:
    part = draft.body.get("part", 0)
    return part if isinstance(part, int) and 0 <= part <= NUMBER_MAX else 0


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True
