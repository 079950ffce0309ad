"""What the model sees: a valid transcript out of any log. Pure; the rules are those of docs/internals/context-log.md.

The host has the same rules (it cannot be imported here, and this cannot be imported there); a property test holds the two
equal on any log. Every assistant entry opens a block with one slot a tool call; outcomes fill slots, whatever stands
between them in the log; when the blocks are written out, an unfilled slot gets a text that says why it is unfilled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recess_agent.cut_replies import mended
from recess_agent.recovery_notes import Entry, recovery_notes

_FAR = 1 << 62
Message = dict[str, Any]

NOTE_MARK = "[recess] "
DOUBT = "outcome unknown: it may or may not have happened. Do not retry without checking."
NOT_IN_BRANCH = "not run in this branch"
NO_RESULT = "no result is recorded"
REPEATABLE = ("local", "pure", "keyed")


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(str(data.get("session", "")), int(data["position"]), data["kind"], data["body"], data.get("ref") or "")


@dataclass(frozen=True)
class Mark:
    """A system, compact or rewind entry, reduced to what decides the branch. `to` is 0 for system entries."""

    position: int
    kind: str
    to: int


@dataclass(frozen=True)
class TailPlan:
    """Read everything after `after`, and the system entry at `system` (0: none) if it is not among that."""

    after: int
    system: int


def plan_tail(marks_newest_first: Iterable[Mark]) -> TailPlan:
    """Decide where the tail begins; takes no more marks than it needs."""
    upper = _FAR
    after: int | None = None
    system = 0
    for mark in marks_newest_first:
        if mark.position > upper:
            continue
        if mark.kind == "rewind":
            upper = min(upper, mark.to)
        elif mark.kind == "compact" and after is None:
            after = min(mark.to, mark.position - 1)
        elif mark.kind == "system" and not system:
            system = mark.position
        if after is not None and system:
            break
    return TailPlan(after or 0, system)


def mark_of(entry: Entry) -> Mark | None:
    """Return the entry as a mark, or None if it is no mark (or one whose `to` is unreadable: it then does nothing)."""
    if entry.kind == "system":
        return Mark(entry.position, entry.kind, 0)
    if entry.kind in ("compact", "rewind"):
        to = entry.body.get("to")
        if isinstance(to, int) and 0 <= to < entry.position:
            return Mark(entry.position, entry.kind, to)
    return None


def on_branch(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that no rewind hides, in order; rewinds themselves are kept."""
    upper = _FAR
    kept: list[Entry] = []
    for entry in reversed(entries):
        if entry.position > upper:
            continue
        kept.append(entry)
        if entry.kind == "rewind" and (mark := mark_of(entry)):
            upper = min(upper, mark.to)
    kept.reverse()
    return kept


def model_view(entries: Sequence[Entry]) -> tuple[Entry | None, Entry | None, list[Entry]]:
    """Return (newest system entry, newest compaction, entries after what it stands for), all on the branch."""
    kept = on_branch(entries)
    plan = plan_tail(mark for entry in reversed(kept) if (mark := mark_of(entry)))
    system = next((e for e in kept if e.position == plan.system), None)
    compacts = [e for e in kept if e.kind == "compact" and mark_of(e)]
    return system, (compacts[-1] if compacts else None), [e for e in kept if e.position > plan.after]


@dataclass
class _Slot:
    """One tool call of a reply: `call_id` as logged, `shown_id` unique within the reply."""

    call_id: str
    shown_id: str
    name: str
    start: Entry | None = None
    text: str | None = None
    error: bool = False
    doubt: bool = False


@dataclass
class _Block:
    """An assistant entry (None: what comes before the first), its slots, and the user-side messages after it."""

    entry: Entry | None
    message: Message | None = None
    slots: list[_Slot] = field(default_factory=list)
    after: list[Message] = field(default_factory=list)
    cut: str = ""  # why no further outcome can come: text for unfilled slots
    forked: bool = False


@dataclass
class Built:
    """A transcript, and what later entries could change in it. `settled`: nothing, but for an outcome of a call in `open`, or a turn
    that begins with a message in `loose`; and a new system entry, a compaction or a rewind change anything."""

    messages: list[Message]
    settled: bool
    open: set[str]
    loose: set[int]


def messages(log: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return neutral messages: {role, text}, an assistant's `tool_calls`, a tool's `tool_call_id`, `name`, `error`."""
    return build(log).messages


def build(log: Sequence[Mapping[str, Any]]) -> Built:
    """Make the transcript of a log."""
    entries = [_entry(one) for one in log]
    system, compact, rest = model_view(entries)
    blocks = [_Block(None)]
    if compact is not None:
        summary = _text(compact.body, "summary")
        blocks[0].after.append(_note(f"Summary of the conversation before this point:\n{summary}"))
    ordered = in_turn_order(entries, rest)
    shown = mended(ordered)
    told = recovery_notes(shown)
    for i, entry in enumerate(shown):
        _take(blocks, entry, told.get(i, ""))
    out: list[Message] = []
    if system is not None and _text(system.body, "text"):
        out.append({"role": "system", "text": _text(system.body, "text")})
    for block in blocks:
        out += _write(block)
    return Built(out, *_unsettled(blocks, entries, rest, ordered))


def _unsettled(
    blocks: Sequence[_Block], entries: Sequence[Entry], rest: Sequence[Entry], ordered: Sequence[Entry]
) -> tuple[bool, set[str], set[int]]:
    """Return `settled`, `open` and `loose` of what was built. The newest reply's calls must have ended: what is told of the others
    depends on what comes next. And nobody's message may be left out, waiting for its turn."""
    open_calls = {slot.call_id for block in blocks for slot in block.slots if slot.text is None or slot.doubt}
    begun = _begun(entries)
    loose = {entry.position for entry in rest if entry.kind == "user" and entry.position not in begun}
    ended = all(slot.text is not None and not slot.doubt for slot in blocks[-1].slots)
    return ended and len(ordered) == len(rest), open_calls, loose


def in_turn_order(entries: Sequence[Entry], shown: Sequence[Entry]) -> list[Entry]:
    """Return `shown` with each queued user message where its turn begins, those whose turn has not begun left out.

    A message sent while a turn is at work stands among that turn's entries in the log; the reply after it was made
    without it, so the model must see it at the beginning of its own turn (the first turn.start whose `inbox` names it).
    One that was passed over (a later one was accepted, or a fork or rewind came after it) stays where it came, and so
    does one sent with mode "steer", unless a turn of its own was begun for it.
    """
    accepted = _begun(entries)
    branched = max((entry.position for entry in entries if entry.kind in ("fork", "rewind")), default=0)
    passed = max([branched, *accepted])
    placed: list[tuple[float, Entry]] = []
    for entry in shown:
        if entry.kind == "user" and entry.position in accepted:
            placed.append((accepted[entry.position] - 0.5, entry))
        elif entry.kind != "user" or entry.body.get("mode") == "steer" or entry.position < passed:
            placed.append((entry.position, entry))
    return [entry for _, entry in sorted(placed, key=lambda pair: pair[0])]


def _begun(entries: Sequence[Entry]) -> dict[int, int]:
    """Return which messages a turn began with, and where the first of these turns begins."""
    found: dict[int, int] = {}
    for entry in entries:
        inbox = entry.body.get("inbox") if entry.kind == "turn.start" else None
        if isinstance(inbox, int) and inbox < entry.position:
            found.setdefault(inbox, entry.position)
    return found


def _take(blocks: list[_Block], entry: Entry, recovery: str) -> None:
    """Put one entry where it belongs, with the note of the recovery that it ends. Kinds not named are not for the model."""
    block = blocks[-1]
    if block.entry is not None and entry.session != block.entry.session:
        block.forked = True
    if entry.kind == "assistant":
        blocks.append(_open_block(entry))
        if entry.body.get("partial") is True and (ask := _text(entry.body, "ask")):
            blocks[-1].after.append(_note(ask))
    elif entry.kind == "user":
        block.after.append({"role": "user", "text": _text(entry.body, "text")})
    elif entry.kind == "answer":
        if not _fill(blocks, entry, _text(entry.body, "text")) and entry.body.get("hidden") is not True:
            block.after.append({"role": "user", "text": _text(entry.body, "text")})
    elif entry.kind == "tool.start":
        slot = _find(blocks, entry.ref, lambda s: s.start is None and s.text is None)
        if slot is not None:
            slot.start = entry
    elif entry.kind in ("tool.result", "tool.settled"):
        _outcome(blocks, entry)
    elif entry.kind == "tool.doubt":
        slot = _find(blocks, entry.ref, lambda s: s.text is None)
        if slot is not None:
            slot.text, slot.error, slot.doubt = _doubt_text(_text(entry.body, "reason")), True, True
    else:
        if entry.kind == "turn.cut":
            block.cut = block.cut or _text(entry.body, "cause") or "crash"
        elif entry.kind == "fork" and "parent" in entry.body:
            block.forked = True
        told = recovery or _told(entry)
        if told:
            block.after.append(_note(told))


def _open_block(entry: Entry) -> _Block:
    slots: list[_Slot] = []
    calls: list[dict[str, Any]] = []
    raw = entry.body.get("tool_calls")
    seen: set[str] = set()
    for i, call in enumerate(raw if isinstance(raw, list) else ()):
        name = call.get("name") if isinstance(call, Mapping) else None
        if not isinstance(name, str) or not name:
            continue
        call_id = call.get("id") if isinstance(call.get("id"), str) else ""
        shown = call_id or f"call_{entry.position}_{i}"
        while shown in seen:
            shown += "~"
        seen.add(shown)
        arguments = call.get("arguments")
        calls.append({"id": shown, "name": name, "arguments": arguments if isinstance(arguments, (dict, str)) else {}})
        slots.append(_Slot(call_id or shown, shown, name))
    message: Message = {"role": "assistant", "text": _text(entry.body, "text")}
    if calls:
        message["tool_calls"] = calls
    return _Block(entry, message if calls or message["text"] else None, slots)


def _find(blocks: list[_Block], call_id: str, wanted: Any) -> _Slot | None:
    """Return the newest reply's first slot of this call that is `wanted`."""
    for block in reversed(blocks):
        for slot in block.slots:
            if slot.call_id == call_id and wanted(slot):
                return slot
    return None


def _fill(blocks: list[_Block], entry: Entry, text: str, *, error: bool = False) -> bool:
    slot = _find(blocks, entry.ref, lambda s: s.text is None) if entry.ref else None
    if slot is None:
        return False
    slot.text, slot.error = text, error
    return True


def _outcome(blocks: list[_Block], entry: Entry) -> None:
    """A result ends an open call, or a doubt: in its place while no later reply has seen the doubt, else as a note."""
    text, error = _text(entry.body, "output"), bool(entry.body.get("error"))
    if _fill(blocks, entry, text, error=error):
        return
    doubted = _find(blocks, entry.ref, lambda s: s.doubt)
    if doubted is None:
        return
    doubted.doubt = False
    if doubted in blocks[-1].slots:
        doubted.text, doubted.error = text, error
    else:
        blocks[-1].after.append(_note(f"The outcome of {doubted.name} ({doubted.shown_id}) is known now: {text}"))


def _write(block: _Block) -> list[Message]:
    out = [block.message] if block.message is not None else []
    for slot in block.slots:
        text, error = (slot.text, slot.error) if slot.text is not None else (_unfilled(slot, block), True)
        answer: Message = {"role": "tool", "tool_call_id": slot.shown_id, "name": slot.name, "text": text}
        out.append({**answer, "error": True} if error else answer)
    return out + block.after


def _unfilled(slot: _Slot, block: _Block) -> str:
    """Say why a call has no outcome. A started `once` call is a doubt, and so is one of an effect class that is not known
    here; the others may be asked for again."""
    if slot.start is not None and slot.start.body.get("effect") not in REPEATABLE:
        return _doubt_text("it was started and its result was never recorded")
    if block.forked:
        return NOT_IN_BRANCH
    if block.cut:
        begun = "it had begun and " if slot.start is not None else "it was not started and "
        return f"cut ({block.cut}): {begun}{NO_RESULT}"
    return NO_RESULT


def _doubt_text(reason: str) -> str:
    return f"{DOUBT} ({reason})" if reason else DOUBT


def _told(entry: Entry) -> str:
    """Return what the model is told of an entry that is no message, or ''."""
    body = entry.body
    if entry.kind == "turn.end" and body.get("status") in ("failed", "cancelled"):
        return _sentence(f"The turn was ended: {body['status']}", _text(body, "error"))
    return ""


def _sentence(*parts: str) -> str:
    return ". ".join(part.rstrip(". ") for part in parts if part) + "."


def _note(text: str) -> Message:
    return {"role": "user", "text": NOTE_MARK + text, "note": True}


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def to_openai(transcript: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages in the form of OpenAI's chat completions API (arguments as JSON text, errors as text)."""
    out: list[dict[str, Any]] = []
    for message in transcript:
        role, text = message["role"], message["text"]
        if role == "tool":
            content = f"Error: {text}" if message.get("error") else text
            out.append({"role": "tool", "tool_call_id": message["tool_call_id"], "content": content})
        elif message.get("tool_calls"):
            calls = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": _wire(c["arguments"])}}
                for c in message["tool_calls"]
            ]
            out.append({"role": role, "content": text or None, "tool_calls": calls})
        else:
            out.append({"role": role, "content": text})
    return out


def _wire(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
