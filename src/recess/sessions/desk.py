"""The one place where a session's owner entries are written: under the lease's epoch, with host-derived keys, in order.

It keeps the facts of the turn at work by folding every entry it writes. It must know nothing of machines or sockets.

Crash safety: each method is one append (one transaction of the log); `consumed` is advanced after the turn.start that
names the message, and `load` takes the larger of the two, so a crash in between neither loses nor doubles a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recess.clock import Clock
from recess.contextlog.contract import ContextLog, Delta, Draft, Entry, SessionRow
from recess.crashpoints import crash_point
from recess.errors import IllegalState
from recess.sessions.facts import OpenCall, TurnFacts, fold, is_work, observe
from recess.sessions.keys import call_key, end_key, entry_key, start_key
from recess.sessions.protocol import DeltaLine, Request
from recess.sessions.recovery import settle

READ_BACK = 256


@dataclass(frozen=True)
class Written:
    """Where an append landed: `key` is the tool call's key for its provider ("" for other kinds)."""

    position: int
    ts: float
    key: str


class Desk:
    """Owner appends of one session under one epoch. `lock` is held over every append, and by a freeze over all of it."""

    def __init__(self, log: ContextLog, row: SessionRow, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self.session = row.id
        self.epoch = row.epoch
        self.code_version = row.code_version
        self.consumed = row.consumed
        self.facts = TurnFacts()
        self.lock = asyncio.Lock()
        self.on_append: list[asyncio.Event] = []

    async def load(self, row: SessionRow) -> None:
        """Fold what the log says since the newest turn began and since the newest snapshot."""
        since = row.snapshot_position
        entries = await read_back(self._log, row, since)
        self.facts = fold(entries)
        self.consumed = max(self.consumed, *(int(e.body.get("inbox", 0)) for e in entries if e.kind == "turn.start"), 0)

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
                self.facts = observe(self.facts, self._entry(draft, one.position))
            _crash_after(draft.kind)
        return [one.position for one in done]

    def _entry(self, draft: Draft, position: int) -> Entry:
        return Entry(
            session=self.session, position=position, kind=draft.kind, body=draft.body, turn=draft.turn, ref=draft.ref,
            key=draft.key, epoch=self.epoch, code_version=self.code_version, ts=self._clock.wall_s(), schema=draft.schema,
        )  # fmt: skip

    # -- the agent's appends ---------------------------------------------------------------------------------------

    async def agent_append(self, request: Request) -> Written:
        """Append what the agent said. An agent that speaks of a turn that is not at work is out of date: IllegalState."""
        facts = self.facts
        if request.turn and (request.turn != facts.turn or not facts.open):
            raise IllegalState(f"turn {request.turn} is not at work", turn=facts.turn)
        if not request.turn and request.kind != "note" and not request.kind.startswith("x."):
            raise IllegalState(f"{request.kind} belongs into a turn")
        key = entry_key(request)
        secret = call_key(self.session, request.turn, request.ref) if request.kind == "tool.start" else ""
        known = self.facts.keys.get(key) if key else None
        if known is not None and request.kind == "tool.start":
            # A call begun by an earlier attempt; whether it may run again was decided before this turn went on.
            return Written(known, self._clock.wall_s(), secret)
        draft = Draft(kind=request.kind, body=request.body, turn=request.turn, ref=request.ref, key=key)
        (position,) = await self.append([draft])
        return Written(position, self._clock.wall_s(), secret)

    async def delta(self, line: DeltaLine) -> None:
        """Keep a piece of a reply; one for a turn that is not at work is dropped."""
        if self.facts.open and line.turn == self.facts.turn:
            await self._log.put_delta(self.session, self.epoch, Delta(line.turn, line.part, line.n, line.text))

    # -- turns -----------------------------------------------------------------------------------------------------

    async def pending_input(self) -> Entry | None:
        """Return the next user message, consuming answers and cancels of no turn on the way."""
        passed = self.consumed
        found: Entry | None = None
        for entry in await self._log.inbox_after(self.session, self.consumed):
            if entry.kind == "user":
                found = entry
                break
            passed = entry.position
        if passed > self.consumed and not self.facts.open:
            await self._log.update(self.session, self.epoch, consumed=passed)
            self.consumed = passed
        return found

    async def start_turn(self, message: Entry) -> None:
        """Begin the turn that answers this message."""
        turn = self.facts.turn + 1
        body = {"inbox": message.position, "attempt": 1}
        await self.append([Draft("turn.start", body, turn=turn, key=start_key(turn, 1))])
        self.consumed = message.position
        await self._log.update(self.session, self.epoch, consumed=self.consumed, turn=turn, attempts=1)

    async def next_attempt(self) -> None:
        """Begin the open turn anew after a cut."""
        facts = self.facts
        attempt = facts.attempt + 1
        body = {"inbox": facts.inbox, "attempt": attempt}
        await self.append([Draft("turn.start", body, turn=facts.turn, key=start_key(facts.turn, attempt))])
        await self._log.update(self.session, self.epoch, attempts=attempt)

    async def end_turn(self, status: str, error: str = "") -> None:
        """End the open turn: done | failed | cancelled."""
        body: dict[str, Any] = {"status": status}
        if error:
            body["error"] = error
        await self.append([Draft("turn.end", body, turn=self.facts.turn, key=end_key(self.facts.turn))])

    async def settle(self, *, cause: str, detail: str, machine_lives: bool, machine_position: int = 0) -> None:
        """Settle what the open turn left open, in one transaction (see `recovery.settle`)."""
        deltas = await self._log.deltas(self.session)
        await self.append(
            settle(
                self.facts, deltas, cause=cause, detail=detail, machine_lives=machine_lives,
                machine_position=machine_position,
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
