"""The context log in memory: the twin of `SqlLog` for tests and for trying things out. Nothing survives the process.

Every method runs without giving way to another task between its first look and its last change, which makes it a
transaction. It decides nothing by itself: `rules`, `lineage` and `branch` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from recess.clock import Clock, SystemClock
from recess.contextlog import blobs, lineage, rules
from recess.contextlog.bodies import MemoryBodies
from recess.contextlog.branch import Mark, plan_tail
from recess.contextlog.contract import INBOX_KINDS, Appended, Blob, Born, Delta, Draft, Entry, Piece, SessionRow
from recess.contextlog.lineage import Range
from recess.contextlog.rules import Packed
from recess.contextlog.wake import WakeHub
from recess.errors import BadInput, NameInUse, NotFound
from recess.ids import new_id


@dataclass(frozen=True)
class _Stored:
    packed: Packed
    position: int
    epoch: int
    code_version: str
    ts: float


@dataclass
class _Session:
    row: SessionRow
    inherited: tuple[Range, ...] = ()
    entries: list[_Stored] = field(default_factory=list)
    keys: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    deltas: dict[tuple[int, int, int], Delta] = field(default_factory=dict)

    @property
    def ranges(self) -> list[Range]:
        return lineage.ranges_of(self.row.id, self.inherited, self.row.fork_position, self.row.head)


class MemoryLog:
    """`ContextLog` in a dict."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._hub = WakeHub(self._clock)
        self._sessions: dict[str, _Session] = {}
        self._bodies = MemoryBodies()

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
        return self._insert(_Session(row))

    async def get(self, ref: str) -> SessionRow:
        """Return by id, name or unambiguous id prefix."""
        if ref in self._sessions:
            return self._sessions[ref].row
        newest = [s.row for s in reversed(self._sessions.values())]
        named = [r for r in newest if ref and r.name == ref]
        if named:
            return min(named, key=lambda r: r.state == rules.CLOSED)
        for head in (ref, f"ses_{ref}") if ref else ():
            found = [r for r in newest if r.id.startswith(head)]
            if len(found) > 1:
                raise BadInput(f"{ref!r} is ambiguous: several sessions begin with it", hint="give more of the id")
            if found:
                return found[0]
        raise _no_session(ref)

    async def list_sessions(self, *, states: Sequence[str] = (), limit: int = 1000) -> list[SessionRow]:
        """Return newest first."""
        rows = (s.row for s in reversed(self._sessions.values()))
        return [r for r in rows if not states or r.state in states][:limit]

    async def claim(self, session: str, owner: str, lease_s: float, *, now: float, force: bool = False) -> SessionRow:
        """Take the lease, raise the epoch (see the contract)."""
        found = self._load(session)
        rules.check_claim(found.row, owner, now, force=force)
        return self._set(found, epoch=found.row.epoch + 1, owner=owner, lease_until=now + lease_s)

    async def claim_abandoned(self, owner: str, lease_s: float, *, now: float, limit: int = 16) -> list[SessionRow]:
        """Take leases that have ended (see the contract)."""
        found = sorted(
            (s for s in self._sessions.values() if rules.abandoned(s.row, now)), key=lambda s: s.row.lease_until
        )
        return [self._set(s, epoch=s.row.epoch + 1, owner=owner, lease_until=now + lease_s) for s in found[:limit]]

    async def renew(self, session: str, epoch: int, lease_s: float, *, now: float) -> None:
        """Extend the lease; Fenced if the epoch is stale. Wakes nobody."""
        found = self._owned(session, epoch)
        found.row = replace(found.row, lease_until=now + lease_s)

    async def append(self, session: str, epoch: int, drafts: Sequence[Draft]) -> list[Appended]:
        """Owner append, all or nothing (see the contract)."""
        packed = rules.pack_all(drafts)
        return self._append(self._owned(session, epoch), packed)

    async def append_inbox(self, session: str, draft: Draft) -> Appended:
        """Inbox append (see the contract)."""
        packed, found = rules.pack(draft, inbox=True), self._load(session)
        known = rules.place([packed], found.row.head, found.keys.get)[0]
        if known.replayed:
            return known.appended
        rules.check_open(found.row)
        return self._append(found, [packed])[0]

    async def update(self, session: str, epoch: int, **changes: Any) -> SessionRow:
        """Owner: set columns of the session's row (see the contract)."""
        checked = rules.check_changes(changes)
        found = self._owned(session, epoch)
        self._check_name(str(checked.get("name", "")), session)
        return self._set(found, **checked)

    async def freeze(
        self, session: str, epoch: int, *, consumed: int, snapshot: str, position: int, drafts: Sequence[Draft] = ()
    ) -> bool:
        """The check-and-set (see the contract)."""
        packed = rules.pack_all(drafts)
        found = self._owned(session, epoch)
        if await self.inbox_after(session, consumed):
            return False
        self._append(found, packed)
        self._set(
            found,
            state=rules.FROZEN,
            consumed=consumed,
            snapshot=snapshot,
            snapshot_position=found.row.head if position < 0 else position,
            owner="",
            lease_until=0.0,
        )
        return True

    async def release(self, session: str, epoch: int, *, state: str) -> None:
        """Give the lease back with this state; Fenced if stale."""
        rules.check_state(state)
        self._set(self._owned(session, epoch), state=state, owner="", lease_until=0.0)

    async def read(
        self, session: str, *, after: int = 0, to: int | None = None, limit: int = 1000, max_bytes: int | None = None
    ) -> list[Entry]:
        """Return entries in order, lineage included (see the contract)."""
        found = self._load(session)
        last = found.row.head if to is None else to
        out: list[Entry] = []
        spent = 0
        for owner, stored in self._stored(found, max(after, 0), last)[: max(limit, 0)]:
            if max_bytes is not None and out and spent + len(stored.packed.body) > max_bytes:
                break
            spent += len(stored.packed.body)
            out.append(_entry(owner, stored))
        return out

    async def tail(self, session: str, *, limit: int | None = None) -> list[Entry]:
        """Return what `messages()` needs (see the contract)."""
        found = self._load(session)
        every = self._stored(found, 0, found.row.head)
        plan = plan_tail(
            Mark(s.position, s.packed.kind, s.packed.mark) for _, s in reversed(every) if s.packed.mark is not None
        )
        last = found.row.head if limit is None else plan.after + limit
        return [_entry(owner, s) for owner, s in every if plan.after < s.position <= last or s.position == plan.system]

    async def inbox_after(self, session: str, position: int) -> list[Entry]:
        """Return the inbox entries after a position."""
        found = self._load(session)
        return [e for e in self._entries(found, max(position, 0), found.row.head) if e.kind in INBOX_KINDS]

    async def put_delta(self, session: str, epoch: int, delta: Delta) -> None:
        """Keep a piece of a streaming reply."""
        rules.check_delta(delta)
        found = self._owned(session, epoch)
        if delta.n == 0:
            _drop_deltas(found, delta.turn, delta.part)
        found.deltas[delta.turn, delta.part, delta.n] = delta
        self._hub.notify(session)

    async def deltas(self, session: str) -> list[Delta]:
        """Return the pieces of replies that have no final entry yet."""
        return [delta for _, delta in sorted(self._load(session).deltas.items())]

    async def put_piece(self, data: bytes) -> Piece:
        """Keep some bytes of a blob (see the contract)."""
        return Piece(self._bodies.put(data), len(data))

    async def get_piece(self, piece: Piece) -> bytes:
        """Return the bytes of a piece (see the contract)."""
        return self._bodies.get(piece.hash, piece.size)

    async def find_blobs(self, session: str, digest: str = "") -> list[Blob]:
        """Return the blobs that a session's log names (see the contract)."""
        found = self._load(session)
        stored = [_blob(*one) for one in self._stored(found, 0, found.row.head) if one[1].packed.kind == blobs.KIND]
        return [one for one in reversed(stored) if digest in ("", one.hash)][: blobs.LIST_MAX]

    async def blob_bytes(self, session: str) -> int:
        """Return how many bytes of blobs a session has put itself."""
        return sum(one.size for one in await self.find_blobs(session) if one.session == session)

    async def fork(
        self, session: str, *, at: int | None = None, name: str = "", session_id: str = "", born: Born | None = None
    ) -> SessionRow:
        """Make a child that shares the parent's entries up to `at` (see the contract)."""
        parent = self._load(session)
        cut = rules.check_fork_point(parent.row, at)
        turn, consumed = parent.row.turn, parent.row.consumed
        if born is not None or cut != parent.row.head:
            starts = [e for e in self._entries(parent, 0, cut) if e.kind == "turn.start"]
            inbox = starts[-1].body.get("inbox") if starts else 0
            turn, consumed = (starts[-1].turn if starts else 0), inbox if isinstance(inbox, int) else consumed
        row = rules.child_of(
            parent.row, session_id or new_id("ses"), name, cut, turn, consumed, self._clock.wall_s()
        )  # fmt: skip
        inherited = tuple(lineage.clip(parent.ranges, 0, cut))
        if born is None:
            return self._insert(_Session(row, inherited))
        packed, child = rules.pack_all([born.first]), _Session(rules.born_as(row, born), inherited)
        self._insert(child)
        self._append(child, packed)
        return child.row

    async def close(self, session: str, epoch: int | None = None) -> None:
        """End the session for good; reading stays possible."""
        found = self._load(session) if epoch is None else self._owned(session, epoch)
        if found.row.state != rules.CLOSED:
            found.deltas.clear()
            self._set(found, state=rules.CLOSED, epoch=found.row.epoch + 1, owner="", lease_until=0.0)

    def ticket(self, session: str) -> int:
        """Return the session's present change number, for `wait` (see the contract)."""
        return self._hub.ticket(session)

    async def wait(self, session: str, after: int, timeout_s: float, *, ticket: int | None = None) -> bool:
        """Return True as soon as head > after or anything changes; False on timeout."""

        async def ready() -> bool:
            return self._load(session).row.head > after

        return await self._hub.wait(session, ready, timeout_s, ticket)

    def _insert(self, new: _Session) -> SessionRow:
        if new.row.id in self._sessions:
            raise NameInUse(f"the session id {new.row.id} is in use", hint="leave it out to get a new one")
        self._check_name(new.row.name, new.row.id)
        self._sessions[new.row.id] = new
        self._hub.notify(new.row.id)
        return new.row

    def _check_name(self, name: str, session: str) -> None:
        for other in self._sessions.values():
            if name and other.row.name == name and other.row.state != rules.CLOSED and other.row.id != session:
                raise NameInUse(f"the name {name!r} is in use by session {other.row.id}", hint="choose another name")

    def _load(self, session: str) -> _Session:
        found = self._sessions.get(session)
        if found is None:
            raise _no_session(session)
        return found

    def _owned(self, session: str, epoch: int) -> _Session:
        found = self._load(session)
        rules.check_owner(found.row, epoch)
        return found

    def _set(self, found: _Session, **changes: Any) -> SessionRow:
        found.row = replace(found.row, **changes)
        self._hub.notify(found.row.id)
        return found.row

    def _append(self, found: _Session, packed: Sequence[Packed]) -> list[Appended]:
        placed = rules.place(packed, found.row.head, found.keys.get)
        row, ts = found.row, self._clock.wall_s()
        for item in placed:
            ended = rules.ends_deltas(item.packed)
            if ended is not None:
                _drop_deltas(found, *ended)
            if item.replayed:
                continue
            found.entries.append(_Stored(item.packed, item.position, row.epoch, row.code_version, ts))
            if item.packed.key:
                found.keys[item.packed.key] = (item.position, item.packed.digest)
        self._set(found, head=max((p.position for p in placed if not p.replayed), default=row.head))
        return [item.appended for item in placed]

    def _stored(self, found: _Session, after: int, to: int) -> list[tuple[str, _Stored]]:
        out: list[tuple[str, _Stored]] = []
        for part in lineage.clip(found.ranges, after, to):
            owner = self._sessions[part.owner]
            base = owner.row.fork_position
            out += [(part.owner, s) for s in owner.entries[part.first - base - 1 : part.last - base]]
        return out

    def _entries(self, found: _Session, after: int, to: int) -> list[Entry]:
        return [_entry(owner, s) for owner, s in self._stored(found, after, to)]


def _drop_deltas(found: _Session, turn: int, part: int | None) -> None:
    for at in [k for k in found.deltas if k[0] == turn and part in (None, k[1])]:
        del found.deltas[at]


def _entry(owner: str, s: _Stored) -> Entry:
    p = s.packed
    body = msgspec.json.decode(p.body, type=dict[str, Any])
    return Entry(owner, s.position, p.kind, body, p.turn, p.ref, p.key, s.epoch, s.code_version, s.ts, p.schema)


def _blob(owner: str, s: _Stored) -> Blob:
    facts = msgspec.json.decode(s.packed.body, type=dict[str, Any])
    words = (facts["hash"], facts["size"], facts["media_type"], facts["name"])
    return Blob(*words, session=owner, position=s.position, pieces=s.packed.pieces)


def _no_session(ref: str) -> NotFound:
    return NotFound(f"no such session: {ref[:200]}", hint="list them: recess session ls", kind="session", ref=ref[:200])
