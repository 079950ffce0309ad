"""The one place where a session's owner entries are written: under the lease's epoch, with host-derived keys, in order.

It keeps the facts of the turn at work by folding every entry it writes, and the inbox by looking at what came in. It must
know nothing of machines or sockets.

Crash safety: each method is one append (one transaction of the log). The row's `consumed` and `meta.queued` are moved
together and after the turn.start that names the message; `load` takes what the log says first, so a crash in between
neither loses nor doubles a message. A `cancel` is passed by `consumed` only once its turn has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recess.clock import Clock
from recess.contextlog.contract import ContextLog, Delta, Draft, Entry, SessionRow
from recess.crashpoints import crash_point
from recess.errors import IllegalState
from recess.sessions.facts import SPAWN, OpenCall, TurnFacts, fold, is_work, observe
from recess.sessions.inbox import Inbox, arrive, begun, ended, restored
from recess.sessions.keys import call_key, end_key, entry_key, start_key
from recess.sessions.limits import GRACE_BYTES, Limits, excess
from recess.sessions.observing import Observer, Observers
from recess.sessions.protocol import DeltaLine, Request
from recess.sessions.recovery import settle

READ_BACK = 256


@dataclass(frozen=True)
class Written:
    """Where an append landed: `key` is the tool call's key for its provider ("" for other kinds), `body` what was written
    if that is not what was asked for."""

    position: int
    ts: float
    key: str
    body: Mapping[str, Any] | None = None


class Desk:
    """Owner appends of one session under one epoch. `lock` is held over every append, and by a freeze over all of it."""

    def __init__(self, log: ContextLog, row: SessionRow, clock: Clock, observer: Observer | None = None) -> None:
        self._observer = observer or Observers()
        self._log = log
        self._clock = clock
        self.session = row.id
        self.epoch = row.epoch
        self.code_version = row.code_version
        self.facts = TurnFacts()
        self.snapshotted = row.snapshot_position  # the newest snapshot's position
        self.inbox = Inbox(seen=row.consumed)
        self.limits = Limits()
        self.stopping = False  # the open turn is to be stopped: by a human, by a limit
        self.streamed: dict[int, int] = {}  # bytes of replies of the open turn that have no entry yet, by part
        self.shown = 0  # how far the open turn's model has read, as its agent said last
        self.lock = asyncio.Lock()

    async def load(self, row: SessionRow) -> None:
        """Fold what the log says since the newest turn began and since the newest snapshot."""
        since = row.snapshot_position
        entries = await read_back(self._log, row, since)
        self.facts = fold(entries)
        self._observer.taken_up(self.session, entries)
        begun_to = max((int(e.body.get("inbox", 0)) for e in entries if e.kind == "turn.start"), default=0)
        queued = row.meta.get("queued")
        self.inbox = restored(max(row.consumed, begun_to), queued if isinstance(queued, list) else (), self.facts)
        await self.look()

    async def look(self) -> None:
        """Take note of what came into the inbox."""
        for entry in await self._log.inbox_after(self.session, self.inbox.seen):
            self.inbox = arrive(self.inbox, entry, self.facts)
            if entry.kind == "answer":
                self.facts = observe(self.facts, entry)

    async def append(self, drafts: Sequence[Draft]) -> list[int]:
        """Append as owner; returns positions. Raises Fenced, KeyReused."""
        async with self.lock:
            return await self.append_locked(drafts)

    async def append_locked(self, drafts: Sequence[Draft]) -> list[int]:
        """The same for who holds the lock already."""
        if not drafts:
            return []
        crash_point("session.before_append")
        done = await self._log.append(self.session, self.epoch, drafts)
        for draft, one in zip(drafts, done, strict=True):
            if not one.replayed:
                entry = self._entry(draft, one.position)
                self.facts = observe(self.facts, entry)
                self._observer.saw(self.session, entry)
            if draft.kind == "machine.snapshot":
                self.snapshotted = one.position
            _crash_after(draft.kind)
        return [one.position for one in done]

    def frozen(self, draft: Draft, position: int) -> None:
        """Take note of the entry that a freeze has written in its own transaction."""
        self._observer.saw(self.session, self._entry(draft, position))

    def _entry(self, draft: Draft, position: int) -> Entry:
        return Entry(
            session=self.session, position=position, kind=draft.kind, body=draft.body, turn=draft.turn, ref=draft.ref,
            key=draft.key, epoch=self.epoch, code_version=self.code_version, ts=self._clock.wall_s(), schema=draft.schema,
        )  # fmt: skip

    # -- the agent's appends ---------------------------------------------------------------------------------------

    async def agent_append(self, request: Request) -> Written:
        """Append what the agent said. An agent that speaks of a turn that is not at work is out of date: IllegalState."""
        self.check_turn(request.turn)
        if not request.turn and request.kind != "note" and not request.kind.startswith("x."):
            raise IllegalState(f"{request.kind} belongs into a turn")
        key = entry_key(request)
        secret = call_key(self.session, request.turn, request.ref) if request.kind == "tool.start" else ""
        known = self.facts.keys.get(key) if key else None
        if known is not None and request.kind in ("tool.start", "ask", "timer"):
            # Begun by an earlier attempt. Whether a call may run again was decided before this turn went on; a question
            # is not asked twice, and a time that was set stays as it was set.
            return Written(known, self._clock.wall_s(), secret)
        if request.kind == "tool.start" and self.halted():
            raise IllegalState("the turn is being cancelled: no new call is begun")
        if request.turn and self.facts.output_bytes > self.limits.output_bytes + GRACE_BYTES:
            raise IllegalState("the turn is over its limit of output: nothing more of it is written")
        if request.kind == "assistant":
            self.streamed.pop(int(request.body.get("part", 0)), None)
        draft = self._draft(request, key)
        (position,) = await self.append([draft])
        return Written(position, self._clock.wall_s(), secret, None if draft.body is request.body else draft.body)

    def check_turn(self, turn: int) -> None:
        """Raise IllegalState unless this turn (0: none) is at work."""
        if turn and (turn != self.facts.turn or not self.facts.open):
            raise IllegalState(f"turn {turn} is not at work", turn=self.facts.turn)

    def _draft(self, request: Request, key: str) -> Draft:
        body = request.body
        if request.kind == "timer":
            # The host's clock decides: the guest's stands still while it is frozen.
            body = {"due": round(self._clock.wall_s() + float(body["seconds"]), 3), "state": "set"}
        elif request.kind == "compact":
            # The message of the turn at work is never compacted away. Without `to`: everything before it.
            most = min(self.facts.inbox or self.facts.started, self.facts.started) - 1
            body = {**body, "to": min(int(body.get("to") or most), most)}
        return Draft(request.kind, body, turn=request.turn, ref=request.ref, key=key, schema=request.schema)

    async def spawned(self, turn: int, ref: str, body: Mapping[str, Any]) -> None:
        """Record a child session. Idempotent by `ref`."""
        await self.append([Draft(SPAWN, body, turn=turn, ref=ref, key=f"t{turn}/spawn/{ref}")])

    def excess(self, worked_s: float = 0.0) -> str:
        """Return which of its limits the open turn is over, "" for none."""
        return excess(self.limits, self.facts, worked_s=worked_s, streamed_bytes=sum(self.streamed.values()))

    def halted(self) -> str:
        """Return why the open turn begins no new call, "" if it may."""
        if not (self.inbox.cancel or self.stopping):
            return self.excess()
        return self.inbox.why or self.excess() or "the turn is being stopped"

    async def delta(self, line: DeltaLine) -> None:
        """Keep a piece of a reply; one for a turn that is not at work, or says too much, is dropped."""
        if self.facts.open and line.turn == self.facts.turn and not self.excess():
            before = self.streamed.get(line.part, 0) if line.n else 0
            self.streamed[line.part] = before + len(line.text)
            await self._log.put_delta(self.session, self.epoch, Delta(line.turn, line.part, line.n, line.text))

    # -- turns -----------------------------------------------------------------------------------------------------

    async def start_turn(self) -> None:
        """Begin the turn of the first message that waits. If it is to be cancelled, the same append ends it: a stop that
        came before the machine did is not lost to a crash between the two."""
        turn, position = self.facts.turn + 1, self.inbox.queue[0]
        drafts = [Draft("turn.start", {"inbox": position, "attempt": 1}, turn=turn, key=start_key(turn, 1))]
        if self.inbox.cancel:
            drafts.append(self._end(turn, "cancelled", self.inbox.why, shown=0))
        await self.append(drafts)
        self.inbox, self.shown, self.streamed = begun(self.inbox), 0, {}
        if not self.facts.open:
            self.inbox = ended(self.inbox, shown=0)
        await self._keep_inbox(turn=turn, attempts=1)

    async def keep_waits(self, due: float | None, worked: list[Any] | str = "") -> None:
        """Write down what a session that is put away still has to do: the messages that wait, when to wake, and how long its
        open turn has been at work."""
        await self.save_meta(queued=list(self.inbox.queue) or "", due="" if due is None else due, worked=worked)

    async def sleep_on(self, before: SessionRow) -> None:
        """Let a frozen session be: note the messages that wait, give the lease back. `before`: its row before the claim. What
        comes in meanwhile is after `consumed`, and found by whoever looks next."""
        changes: dict[str, Any] = {}
        if before.meta.get("machine_epoch") == before.epoch:
            changes["machine_epoch"] = self.epoch  # nobody else has driven the machine in between
        await self._keep_inbox(changes)
        await self._log.release(self.session, self.epoch, state=before.state)

    async def _keep_inbox(self, notes: Mapping[str, Any] | None = None, **changes: Any) -> None:
        row = await self._log.get(self.session)
        meta = merged(row.meta, {**(notes or {}), "queued": list(self.inbox.queue) or ""})
        await self._log.update(self.session, self.epoch, consumed=self.inbox.seen, meta=meta, **changes)

    async def save_meta(self, **changes: Any) -> None:
        """Change the sessions room's own data in the row; a value of "" removes its key."""
        row = await self._log.get(self.session)
        meta = merged(row.meta, changes)
        if meta != dict(row.meta):
            await self._log.update(self.session, self.epoch, meta=meta)

    async def next_attempt(self) -> None:
        """Begin the open turn anew after a cut."""
        facts = self.facts
        attempt, self.streamed = facts.attempt + 1, {}
        body = {"inbox": facts.inbox, "attempt": attempt}
        await self.append([Draft("turn.start", body, turn=facts.turn, key=start_key(facts.turn, attempt))])
        await self._log.update(self.session, self.epoch, attempts=attempt)

    async def end_turn(self, status: str, error: str = "") -> None:
        """End the open turn: done | failed | cancelled. What was sent into it too late waits for a turn of its own."""
        # A model that has not finished has read the log for the last time: only a turn that was done can have missed some.
        shown = self.shown if status == "done" else self.inbox.seen
        await self.append([self._end(self.facts.turn, status, error, shown=shown)])
        self.inbox = ended(self.inbox, shown=shown)
        await self._keep_inbox()

    def _end(self, turn: int, status: str, error: str, *, shown: int) -> Draft:
        body: dict[str, Any] = {"status": status}
        if error:
            body["error"] = error
        if self.inbox.cancel or self.inbox.steers:
            # A crash between this entry and the row must not let them count once more.
            body |= {"dealt": self.inbox.seen, "shown": min(shown, self.inbox.seen)}
        return Draft("turn.end", body, turn=turn, key=end_key(turn))

    async def settle(
        self, *, cause: str, detail: str, machine_lives: bool, machine_position: int = 0, memory_bytes: int = 0
    ) -> None:
        """Settle what the open turn left open, in one transaction (see `recovery.settle`)."""
        deltas = await self._log.deltas(self.session)
        await self.append(
            settle(
                self.facts, deltas, cause=cause, detail=detail, machine_lives=machine_lives,
                machine_position=machine_position, memory_bytes=memory_bytes,
            )
        )  # fmt: skip

    def pending_calls(self) -> list[dict[str, Any]]:
        """Return the open calls in the form the agent gets them in when a turn goes on."""
        turn = self.facts.turn
        return [self._pending(turn, call) for call in sorted(self.facts.calls.values(), key=lambda one: one.position)]

    def _pending(self, turn: int, call: OpenCall) -> dict[str, Any]:
        return {
            "call_id": call.call_id, "name": call.name, "arguments": dict(call.arguments), "effect": call.effect,
            "verify": call.verify, "key": call_key(self.session, turn, call.call_id),
        }  # fmt: skip


def merged(meta: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's meta after changes; a value of "" removes its key."""
    return {key: value for key, value in {**meta, **changes}.items() if value != ""}


def _crash_after(kind: str) -> None:
    """Named points, one for each class of entry whose being the last one matters to recovery."""
    match kind:
        case "turn.start":
            crash_point("session.after_turn_start")
        case "turn.end":
            crash_point("session.after_turn_end")
        case "assistant":
            crash_point("session.after_assistant")
        case "tool.start":
            crash_point("session.after_tool_start")
        case "tool.result" | "tool.settled" | "tool.doubt":
            crash_point("session.after_tool_result")
        case "code":
            crash_point("session.after_code")
        case "ask":
            crash_point("session.after_ask")
        case "timer":
            crash_point("session.after_timer")
        case kind if kind == SPAWN:
            crash_point("session.after_spawn")
        case "turn.cut":
            crash_point("session.after_settle")
        case "machine.restore":
            crash_point("session.after_restore")


async def read_back(log: ContextLog, row: SessionRow, since: int) -> list[Entry]:
    """Return the log's end: back to the newest turn's first attempt, and far enough to know whether any work came after
    `since`. Read from the end, so that opening a session does not depend on its age."""
    low = row.head
    entries: list[Entry] = []
    while low > 0:
        start = max(0, low - READ_BACK)
        entries = await log.read(row.id, after=start, to=low, limit=READ_BACK) + entries
        low = start
        begun = any(e.kind == "turn.start" and int(e.body.get("attempt", 1)) == 1 for e in entries)
        if begun and (low <= since or any(is_work(e.kind) and e.position > since for e in entries)):
            break
    return entries
