"""What people say to a session besides plain messages: a stop, an answer to a question. Durable when it returns.

Each is one inbox append with a key of its own kind; waking the session is the service's business. It must know nothing of
supervisors: a session that is frozen, or lives on another node, is spoken to in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recess.contextlog.contract import Appended, ContextLog, Draft, SessionRow
from recess.errors import BadInput, IllegalState, Incompatible, KeyReused, NotFound
from recess.ids import new_id
from recess.sessions.agent_config import CONTRACT_MAX, check_config
from recess.sessions.decisions import Contracts, speaks
from recess.sessions.deps import AgentStore
from recess.sessions.desk import read_back
from recess.sessions.facts import TurnFacts, fold
from recess.sessions.inbox import MODES, QUEUE

REASON_MAX = 500


@dataclass(frozen=True)
class Question:
    """A question that waits for an answer. `choices`: what may be answered ((): anything)."""

    ref: str
    position: int
    turn: int
    text: str
    choices: tuple[str, ...]
    body: Mapping[str, Any]


def message(text: str, *, key: str, mode: str, body: Mapping[str, Any], max_bytes: int, contract: int = 0) -> Draft:
    """Return a user message. `mode`: queue (a turn of its own), steer (the open turn's model sees it at its next call),
    interrupt (the open turn is stopped first). `contract`: see `check_contract`. Raises BadInput."""
    if not 0 <= contract <= CONTRACT_MAX:
        raise BadInput(f"a contract is a number from 0 to {CONTRACT_MAX}, not {contract}")
    if len(text.encode()) > max_bytes:
        raise BadInput(f"a message of more than {max_bytes} bytes")
    if mode not in MODES:
        raise BadInput(f"mode must be one of {', '.join(MODES)}, not {mode[:40]!r}")
    plain = {**body, "text": text, **({"contract": contract} if contract else {})}
    return Draft("user", plain if mode == QUEUE else {**plain, "mode": mode}, key=key or new_id("msg"))


async def check_contract(agents: AgentStore, row: SessionRow, wants: int) -> None:
    """Raise Incompatible if no code of at least this contract will take the message: neither the session's own nor, unless it is
    pinned, the agent's current one."""
    own, current = await agents.get(row.agent, row.code_version), await agents.current(row.agent)
    config = check_config(current.config)
    found = Contracts(wants, check_config(own.config).contract, config.contract)
    if not speaks(config.policy, found):
        raise Incompatible(
            f"this client needs contract {wants} of agent {row.agent}: the session's code has {found.has}, the deployed "
            f"{found.offers} (upgrade policy {config.policy})",
            hint=f"deploy code with contract={wants}, or use an older client",
        )


async def contract_of(log: ContextLog, session: str, position: int) -> int:
    """Return the contract that a message wants."""
    found = await log.read(session, after=position - 1, to=position, limit=1)
    wants = found[0].body.get("contract") if found else 0
    return wants if isinstance(wants, int) else 0


async def facts_of(log: ContextLog, row: SessionRow) -> TurnFacts:
    """Return what the log says of the newest turn."""
    return fold(await read_back(log, row, row.head))


async def questions(log: ContextLog, row: SessionRow) -> list[Question]:
    """Return the open turn's questions that have no answer, oldest first."""
    facts = await facts_of(log, row)
    waiting = [one for ref, one in facts.asks.items() if ref not in facts.answers]
    return [
        Question(e.ref, e.position, e.turn, str(e.body.get("text", "")), tuple(e.body.get("choices") or ()), e.body)
        for e in sorted(waiting, key=lambda one: one.position)
    ]


async def answer(log: ContextLog, row: SessionRow, ref: str, text: str) -> Appended:
    """Answer a question. The same answer again gives the old position; another one is KeyReused. Raises NotFound for what
    nobody asked (or whose turn has ended), BadInput for an answer that is no choice."""
    facts = await facts_of(log, row)
    asked = facts.asks.get(ref)
    if asked is None:
        open_now = ", ".join(one for one in facts.asks if one not in facts.answers) or "none"
        raise NotFound(f"session {row.id} waits for no answer to {ref[:80]!r}", hint=f"open questions: {open_now}")
    choices = asked.body.get("choices") or ()
    if choices and text not in choices:
        raise BadInput(f"the answer must be one of: {', '.join(choices)}")
    body: dict[str, Any] = {"text": text}
    if asked.body.get("show") is not True:
        body["hidden"] = True  # the code that asked says to the model what is to be said
    try:
        return await log.append_inbox(row.id, Draft("answer", body, ref=ref, key=f"answer/{asked.turn}/{ref}"))
    except KeyReused as exc:
        raise KeyReused(f"question {ref} was answered before, otherwise", hint="the first answer stands") from exc


async def cancel(log: ContextLog, row: SessionRow, *, reason: str, turn: int | None, key: str) -> Appended:
    """Ask to stop the open turn (with `turn`: only that one), or the one that is about to begin. Raises IllegalState if
    there is none."""
    facts = await facts_of(log, row)
    begins = not facts.open and turn is None and await log.inbox_after(row.id, row.consumed)
    if not facts.open and not begins:
        raise IllegalState(f"session {row.id} has no turn to cancel")
    if turn is not None and turn != facts.turn:
        raise IllegalState(f"turn {turn} is not at work: the newest is {facts.turn}")
    body: dict[str, Any] = {"reason": reason[:REASON_MAX]} if reason else {}
    if facts.open:
        body["turn"] = facts.turn  # a stop that comes too late for this turn stops no other
    return await log.append_inbox(row.id, Draft("cancel", body, key=key or new_id("msg")))
