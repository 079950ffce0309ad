"""The context log as everybody above sees it: sessions' rows, entries, leases, deltas, forks (docs/internals/context-log.md).

The log is the truth about what was said and done. It must know nothing of machines, snapshots or images: a snapshot
is an opaque string here. Every method is one transaction; what it returned is durable (SQLite: synchronous=FULL with
group commit), deltas excepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

INBOX_KINDS = frozenset({"user", "answer", "cancel"})
OWNER_KINDS = frozenset(
    {
        "system", "assistant", "tool.start", "tool.result", "tool.doubt", "tool.settled", "ask", "turn.start",
        "turn.end", "turn.cut", "compact", "rewind", "fork", "code", "machine.snapshot", "machine.restore",
        "machine.lost", "timer", "note", "blob",
    }
)  # fmt: skip  # and the open namespace "x.*"
INLINE_BYTES_MAX = 16 * 1024
INBOX_BYTES_MAX = 6 * 1024 * 1024  # a body that anybody may append must fit the line in which the agent gets it


@dataclass(frozen=True)
class Piece:
    """A part of a blob: BLAKE3-256 hex and size in bytes, as the body store has it."""

    hash: str
    size: int


@dataclass(frozen=True)
class Blob:
    """Bytes beside the log (`contextlog.blobs`): `hash` is the SHA-256 of the whole; the entry at `position`, of the lineage
    owner `session`, names it."""

    hash: str
    size: int
    media_type: str
    name: str
    session: str
    position: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Draft:
    """An entry that has no position yet. `body` is JSON data; `ref` names what it answers (call id, ask id)."""

    kind: str
    body: Mapping[str, Any]
    turn: int = 0
    ref: str = ""
    key: str = ""  # attempt-independent, e.g. "t12/c3/start"; empty: none (owner entries only)
    schema: int = 1
    pieces: tuple[Piece, ...] = ()  # of a blob's bytes, durable already (`put_piece`)


@dataclass(frozen=True)
class Entry:
    """One durable entry. `position` starts at 1 and has no gaps. `session` is the lineage owner's id for inherited ones."""

    session: str
    position: int
    kind: str
    body: Mapping[str, Any]
    turn: int
    ref: str
    key: str
    epoch: int
    code_version: str
    ts: float
    schema: int


@dataclass(frozen=True)
class SessionRow:
    """One session as the log knows it. `state`: running | parked | frozen | cold | closed (the sessions room's words).

    `head`: last position. `consumed`: last inbox position the agent accepted. `snapshot` is opaque.
    """

    id: str
    name: str
    agent: str
    code_version: str
    state: str
    head: int
    consumed: int
    epoch: int
    owner: str
    lease_until: float  # wall seconds; 0.0: no lease
    parent: str
    fork_position: int
    snapshot: str
    snapshot_position: int
    turn: int
    attempts: int
    created: float
    labels: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)  # sessions' own JSON: machine id, failure ...


@dataclass(frozen=True)
class Appended:
    """The outcome of an append: `replayed` tells that the key was known and the old position is returned."""

    position: int
    replayed: bool


@dataclass(frozen=True)
class Delta:
    """A piece of a reply that is being streamed: `part` names the reply within the turn, `n` counts from 0."""

    turn: int
    part: int
    n: int
    text: str


@dataclass(frozen=True)
class Born:
    """What a fork begins with: its own first entry, and what its row says of its machine."""

    first: Draft
    state: str
    code_version: str
    snapshot: str = ""
    snapshot_position: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)


class ContextLog(Protocol):
    """The log. Raises NotFound, Fenced (stale epoch), KeyReused, NameInUse, IllegalState, Corrupt, OutOfSpace."""

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
        """Make an empty session, state "cold", epoch 0."""
        ...  # fmt: skip

    async def get(self, ref: str) -> SessionRow:
        """Return by id, name or unambiguous id prefix."""
        ...

    async def list_sessions(self, *, states: Sequence[str] = (), limit: int = 1000) -> list[SessionRow]:
        """Return newest first."""
        ...

    async def claim(self, session: str, owner: str, lease_s: float, *, now: float, force: bool = False) -> SessionRow:
        """Take the lease if it is free, expired, ours, or `force` (embedded: the home's lock proved the owner dead).

        Raises the epoch by one. Raises IllegalState if another owner's lease is valid, or the session is closed.
        """
        ...

    async def claim_abandoned(self, owner: str, lease_s: float, *, now: float, limit: int = 16) -> list[SessionRow]:
        """Take the leases of sessions whose owners have let them end, those that ended first; each as by `claim`.

        Nodes that ask at the same time get different ones, and none waits for another."""
        ...

    async def renew(self, session: str, epoch: int, lease_s: float, *, now: float) -> None:
        """Extend; Fenced if the epoch is stale, or if the lease was given back (as every owner call)."""
        ...

    async def append(self, session: str, epoch: int, drafts: Sequence[Draft]) -> list[Appended]:
        """Owner append, all or nothing: check the epoch, the keys, take the next positions, insert.

        The same key with the same content gives the old position; other content raises KeyReused. A final
        "assistant" entry deletes the deltas of its (turn, part) in the same transaction (part = body["part"]).
        """
        ...

    async def append_inbox(self, session: str, draft: Draft) -> Appended:
        """Inbox append: needs a key (BadInput without), no epoch; a body of at most INBOX_BYTES_MAX as JSON (BadInput).
        Closed sessions refuse (IllegalState)."""
        ...

    async def update(self, session: str, epoch: int, **changes: Any) -> SessionRow:
        """Owner: set columns of the session's row (state, consumed, snapshot, snapshot_position, code_version, turn,
        attempts, meta, labels, name). Fenced if stale."""
        ...

    async def freeze(
        self, session: str, epoch: int, *, consumed: int, snapshot: str, position: int, drafts: Sequence[Draft] = ()
    ) -> bool:
        """The check-and-set that makes a lost wake-up impossible, in one transaction: if the inbox holds anything
        after `consumed`, change nothing and return False; else append `drafts`, set state=frozen, the snapshot and
        its position (the head after `drafts`, when `position` is -1), release the lease, and return True.

        After a freeze, as after a release, the epoch may not write any more: what must be recorded goes into `drafts`
        or an `update` before."""
        ...

    async def release(self, session: str, epoch: int, *, state: str) -> None:
        """Give the lease back with this state; Fenced if stale."""
        ...

    async def read(
        self, session: str, *, after: int = 0, to: int | None = None, limit: int = 1000, max_bytes: int | None = None
    ) -> list[Entry]:
        """Return entries in order, lineage included; bodies over INLINE_BYTES_MAX are resolved from their blob.

        `max_bytes` bounds the bodies together: the list ends early, but never before its first entry. Whoever takes a short
        list for the end of the log must not give it: ask again after the last position."""
        ...

    async def tail(self, session: str, *, limit: int | None = None) -> list[Entry]:
        """Return what `transcript.messages` needs, in order: the newest system entry on the branch and everything after
        what the newest compaction stands for. Costs the tail, whatever the age of the session. `limit`: of what comes after
        the compaction no more than the first so many (at least 1); `read` from the last one's position on gives the rest."""
        ...

    async def inbox_after(self, session: str, position: int) -> list[Entry]:
        """Return the inbox entries (user, answer, cancel) after a position."""
        ...

    async def put_delta(self, session: str, epoch: int, delta: Delta) -> None:
        """Keep a piece of a streaming reply, relaxed durability; `n = 0` starts the reply (turn, part) afresh."""
        ...

    async def deltas(self, session: str) -> list[Delta]:
        """Return the pieces of replies that have no final entry yet."""
        ...

    async def put_piece(self, data: bytes) -> Piece:
        """Keep some bytes of a blob, durably. Who does not name them by an entry within a day loses them. Raises OutOfSpace."""
        ...

    async def get_piece(self, piece: Piece) -> bytes:
        """Return the bytes of a piece of a blob that `find_blobs` gave, verified. Raises Corrupt, Unavailable."""
        ...

    async def find_blobs(self, session: str, digest: str = "") -> list[Blob]:
        """Return the blobs that a session's log names, lineage included, newest first (1,000 at most); with `digest`, those of
        these bytes. What another session's log names is not among them, whoever knows its hash."""
        ...

    async def blob_bytes(self, session: str) -> int:
        """Return how many bytes of blobs a session has put itself."""
        ...

    async def fork(
        self, session: str, *, at: int | None = None, name: str = "", session_id: str = "", born: Born | None = None
    ) -> SessionRow:
        """Make a child that shares the parent's entries up to `at` (default: head), O(1): only lineage ranges copied.

        The child is cold, epoch 0, with the parent's agent, code version and labels, no meta, no keys, no deltas; its
        turn and `consumed` are as they were at `at` (from `turn.start` entries); it refers to the parent's snapshot if
        that is not newer than `at`. A closed session may be forked. BadInput for a position outside the log.
        """
        ...

    async def close(self, session: str, epoch: int | None = None) -> None:
        """End the session for good; reading stays possible. Its owner is fenced. A closed one may be closed again."""
        ...

    def ticket(self, session: str) -> int:
        """Return a number that changes with every change of the session (in this process); see `wait`."""
        ...

    async def wait(self, session: str, after: int, timeout_s: float, *, ticket: int | None = None) -> bool:
        """Return True as soon as head > after, or the session changes in any way (deltas, state); False on timeout.

        With a `ticket` that was taken before reading, changes between the reading and this call count too.
        """
        ...
