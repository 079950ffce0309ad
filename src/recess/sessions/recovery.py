"""The settle pass: what the log must say about a turn that was cut off, before anything runs again.

Pure: facts in, drafts out, by the effect class of each open call. Calls that the agent itself can settle (pure and
keyed: run again; once with verify: ask) stay open and are handed to the next attempt. Keys depend on the log's content
alone, so a settle that is repeated after another crash writes nothing twice. It must know nothing of how drafts are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recess.contextlog.contract import Delta, Draft
from recess.sessions.facts import OpenCall, TurnFacts

INTERRUPTED = "interrupted: the process that ran it is gone; it may have been done in part. Look before you repeat it."
LOST = "lost: the machine was brought back to a moment before this call, what it did here is gone."
DOUBT = "the call had begun and nothing can tell whether it took effect"
GAP = " [a piece of this reply was lost] "


def settle(
    facts: TurnFacts,
    deltas: Sequence[Delta],
    *,
    cause: str,
    detail: str,
    machine_lives: bool,
    machine_position: int,
    memory_bytes: int = 0,
) -> list[Draft]:
    """Return what to append. `machine_position`: the log position the machine's memory and disk are of (ignored when
    the machine lived on); a local call that began after it is lost, an earlier one was interrupted. `memory_bytes`:
    of a machine that ran out of it."""
    if not facts.open or facts.cut:
        return []
    drafts = _partial_replies(facts.turn, deltas)
    for call in sorted(facts.calls.values(), key=lambda one: one.position):
        drafts.extend(_settle_call(facts.turn, call, machine_lives or call.position <= machine_position))
    body: dict[str, Any] = {"cause": cause, "detail": detail}
    if memory_bytes:
        body["memory_bytes"] = memory_bytes
    drafts.append(Draft("turn.cut", body, turn=facts.turn, key=f"t{facts.turn}/cut/{facts.attempt}"))
    return drafts


def _partial_replies(turn: int, deltas: Sequence[Delta]) -> list[Draft]:
    parts: dict[int, dict[int, str]] = {}
    for delta in deltas:
        if delta.turn == turn:
            parts.setdefault(delta.part, {})[delta.n] = delta.text
    drafts = []
    for part, pieces in sorted(parts.items()):
        text, gaps = join_pieces(pieces)
        body: dict[str, Any] = {"text": text, "tool_calls": [], "part": part, "partial": True}
        if gaps:
            body["gaps"] = gaps
        drafts.append(Draft("assistant", body, turn=turn, key=f"t{turn}/p{part}/assistant"))
    return drafts


def join_pieces(pieces: dict[int, str]) -> tuple[str, int]:
    """Return the text of a reply's pieces (number -> text) and how many pieces before the last are known to be missing.
    Where some are, the text says so: two halves joined as if whole would be a sentence nobody said."""
    text: list[str] = []
    expected = missing = 0
    for n in sorted(pieces):
        if n > expected:
            text.append(GAP)
            missing += n - expected
        text.append(pieces[n])
        expected = n + 1
    return "".join(text), missing


def _settle_call(turn: int, call: OpenCall, machine_has_it: bool) -> list[Draft]:
    if call.effect in ("pure", "keyed") or (call.effect == "once" and call.verify):
        return []
    if call.effect == "local":
        body: dict[str, Any] = {"output": INTERRUPTED if machine_has_it else LOST, "error": True}
        return [Draft("tool.result", body, turn=turn, ref=call.call_id, key=f"t{turn}/{call.call_id}/result")]
    # `once`, and every effect class this version does not know: repeating it blindly is what must not happen.
    body = {"name": call.name, "reason": DOUBT}
    return [Draft("tool.doubt", body, turn=turn, ref=call.call_id, key=f"t{turn}/{call.call_id}/doubt")]
