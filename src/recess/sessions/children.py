"""Child sessions: a turn starts one and waits; the child reports when its first turn has ended, which wakes the parent.

Crash safety: the child's id and every key come from (parent, turn, ref), so a spawn that is sent again finds its child, and
a report that is sent again finds its answer. The child remembers whom to report to in its row until it has. It must know
nothing of machines: a child is a session like any other.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from recess.contextlog.contract import Draft, Entry
from recess.crashpoints import crash_point
from recess.errors import BadInput, IllegalState, KeyReused, NameInUse, NotFound
from recess.sessions.deps import Deps
from recess.sessions.desk import Desk
from recess.sessions.keys import child_id
from recess.sessions.protocol import Request

if TYPE_CHECKING:
    from recess.sessions.supervisor import Supervisor

CHILDREN_MAX = 64  # of one turn
DEPTH_MAX = 8
REPORT_TEXT_BYTES = 640 * 1024  # six times that, as JSON may need, still fits an answer to the inbox
REPORT_BACK = 1000  # entries of the child's log in which its last answer is looked for


async def spawn(deps: Deps, desk: Desk, request: Request) -> str:
    """Start a child session with its first message, or find the one that was started under this ref; returns its id.
    Raises NotFound (no such agent), BadInput over the caps."""
    if request.ref not in desk.facts.spawned and len(desk.facts.spawned) >= CHILDREN_MAX:
        raise BadInput(f"a turn starts at most {CHILDREN_MAX} sessions")
    parent = await deps.log.get(desk.session)
    depth = int(parent.meta.get("depth", 0)) + 1
    if depth > DEPTH_MAX:
        raise BadInput(f"sessions start sessions at most {DEPTH_MAX} deep")
    agent, text = str(request.body["agent"]), str(request.body["text"])
    child = child_id(desk.session, request.turn, request.ref)
    version = await deps.agents.current(agent)
    meta = {"report": {"session": desk.session, "ref": request.ref}, "depth": depth}
    with contextlib.suppress(NameInUse):  # this very spawn, sent again
        await deps.log.create(
            agent=agent, code_version=version.version, labels={"spawned-by": desk.session}, meta=meta, session_id=child
        )
    await desk.spawned(request.turn, request.ref, {"child": child, "agent": agent, "text": text})
    await deps.log.append_inbox(child, Draft("user", {"text": text, "from": desk.session}, key="spawn"))
    return child


async def report(sup: Supervisor) -> None:
    """Tell the parent how the first turn ended, if there is one that waits for it and no turn is open. Idempotent."""
    desk, log = sup.held_desk, sup.deps.log
    row = await log.get(sup.session)
    target = row.meta.get("report")
    if not isinstance(target, dict) or desk.facts.open or not desk.facts.turn:
        return
    crash_point("session.before_report")
    entries = await log.read(row.id, after=max(0, row.head - REPORT_BACK), limit=REPORT_BACK)
    body = {**_last_words(entries, desk.facts.turn), "session": row.id, "hidden": True}
    parent = str(target.get("session", ""))
    try:
        await log.append_inbox(parent, Draft("answer", body, ref=str(target.get("ref", "")), key=f"child/{row.id}"))
        sup.wake_other(parent)
    except (NotFound, IllegalState, KeyReused):
        pass  # the parent is closed, or was told already and the row does not say so yet
    crash_point("session.after_report")
    await desk.save_meta(report="")


def _last_words(entries: list[Entry], turn: int) -> dict[str, Any]:
    """Return the text and the status of a turn that has ended."""
    mine = [e for e in entries if e.turn == turn]
    said = [e for e in mine if e.kind == "assistant" and e.body.get("text")]
    ends = [e for e in mine if e.kind == "turn.end"]
    out: dict[str, Any] = {"text": _fitting(str(said[-1].body["text"])) if said else "", "status": "failed"}
    if ends:
        out["status"] = str(ends[-1].body.get("status", "done"))
        if ends[-1].body.get("error"):
            out["error"] = _fitting(str(ends[-1].body["error"]))
    return out


def _fitting(text: str) -> str:
    """Cut a text that no inbox takes: a parent that waits must be told something."""
    data = text.encode("utf-8", "replace")
    if len(data) <= REPORT_TEXT_BYTES:
        return text
    kept = data[:REPORT_TEXT_BYTES].decode("utf-8", "ignore")
    return f"{kept}\n[recess] {len(data) - len(kept.encode())} more bytes are in the log of this session's child"
