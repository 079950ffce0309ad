"""The settle pass: what the log must say about a turn that was cut off, before anything runs again.

`settle` is pure: facts in, drafts out, by the effect class of each open call. Calls that the agent itself can settle
(pure and keyed: run again; once with verify: ask) stay open and are handed to the next attempt. Keys depend on the
log's content alone, so a settle that is repeated after another crash writes nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recess.contextlog.contract import ContextLog, Delta, Draft
from recess.sessions.desk import Desk
from recess.sessions.facts import OpenCall, TurnFacts

INTERRUPTED = "interrupted: the process that ran it is gone; it may have been done in part. Look before you repeat it."
LOST = "lost: the machine was brought back to a moment before this call, what it did here is gone."
DOUBT = "the call had begun and nothing can tell whether it took effect"


def settle(
    facts: TurnFacts, deltas: Sequence[Delta], *, cause: str, detail: str, machine_lives: bool, machine_position: int
) -> list[Draft]:
    """Return what to append. `machine_position`: the log position the machine's memory and disk are of (ignored when
    the machine lived on); a local call that began after it is lost, an earlier one was interrupted."""
    if not facts.open or facts.cut:
        return []
    drafts: list[Draft] = []
    parts: dict[int, list[Delta]] = {}
    for delta in deltas:
        if delta.turn == facts.turn:
            parts.setdefault(delta.part, []).append(delta)
    for part, pieces in sorted(parts.items()):
        text = "".join(one.text for one in sorted(pieces, key=lambda one: one.n))
        body: dict[str, Any] = {"text": text, "tool_calls": [], "part": part, "partial": True}
        drafts.append(Draft("assistant", body, turn=facts.turn, key=f"t{facts.turn}/p{part}/assistant"))
    for call in sorted(facts.calls.values(), key=lambda one: one.position):
        drafts.extend(_settle_call(facts.turn, call, machine_lives or call.position <= machine_position))
    body = {"cause": cause, "detail": detail}
    drafts.append(Draft("turn.cut", body, turn=facts.turn, key=f"t{facts.turn}/cut/{facts.attempt}"))
    return drafts


def _settle_call(turn: int, call: OpenCall, machine_has_it: bool) -> list[Draft]:
    if call.effect in ("pure", "keyed") or (call.effect == "once" and call.verify):
        return []
    if call.effect == "once":
        body: dict[str, Any] = {"name": call.name, "reason": DOUBT}
        return [Draft("tool.doubt", body, turn=turn, ref=call.call_id, key=f"t{turn}/{call.call_id}/doubt")]
    body = {"output": INTERRUPTED if machine_has_it else LOST, "error": True}
    return [Draft("tool.result", body, turn=turn, ref=call.call_id, key=f"t{turn}/{call.call_id}/result")]


async def settle_turn(
    log: ContextLog, desk: Desk, *, cause: str, detail: str, machine_lives: bool, machine_position: int = 0
) -> None:
    """Settle the open turn in one transaction."""
    drafts = settle(
        desk.facts, await log.deltas(desk.session), cause=cause, detail=detail, machine_lives=machine_lives,
        machine_position=machine_position,
    )  # fmt: skip
    await desk.append(drafts)
