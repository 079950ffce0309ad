"""What the model sees: a valid transcript out of any log. Pure; the rules are those of docs/internals/context-log.md.

Always valid, whatever the log holds: at most one system message, first; each tool call is followed at once by exactly
one tool message, in the order of the calls; a result without its call is not shown; what the system itself says is a
user message that begins with `[recess] `.
"""

from __future__ import annotations

import json
from typing import Any

Entry = dict[str, Any]
Message = dict[str, Any]

PREFIX = "[recess] "
OUTCOMES = ("tool.result", "tool.settled", "tool.doubt")
NOT_IN_BRANCH = "not run in this branch"
NO_RESULT = "no result is recorded"
DOUBT = "outcome unknown: it may or may not have happened. Do not retry without checking."


def in_turn_order(entries: list[Entry]) -> list[Entry]:
    """Put each queued user message where its turn begins, and leave out those whose turn has not begun.

    A message sent while a turn was at work waits in the log among that turn's entries; the model must see it as the
    beginning of its own turn. One sent with mode "steer" is seen where it came.
    """
    accepted = {int(e["body"].get("inbox", 0)): e["position"] for e in reversed(entries) if e["kind"] == "turn.start"}
    newest = max(accepted, default=0)
    branched = max((e["position"] for e in entries if e["kind"] in ("fork", "rewind")), default=0)
    queued = {e["position"]: e for e in entries if e["kind"] == "user" and e["body"].get("mode") != "steer"}
    out: list[Entry] = []
    for entry in entries:
        position = entry["position"]
        if position in queued:
            left_behind = position not in accepted and (position < newest or position < branched)
            if left_behind:
                out.append(entry)
            continue
        if entry["kind"] == "turn.start":
            inbox = int(entry["body"].get("inbox", 0))
            if accepted.get(inbox) == position and inbox in queued:
                out.append(queued[inbox])
        out.append(entry)
    return out


def messages(entries: list[Entry]) -> list[Message]:
    """Return neutral messages: {role, text}, an assistant's `tool_calls`, a tool's `tool_call_id`, `name`, `error`."""
    branch = _branch(entries)
    out: list[Message] = []
    system = [e for e in branch if e["kind"] == "system"]
    if system:
        out.append({"role": "system", "text": str(system[-1]["body"].get("text", ""))})
    branch, summary = _compacted(branch)
    if summary:
        out.append(_note("Summary of what came before: " + summary))
    for index, entry in enumerate(branch):
        _show(entry, branch, index, out)
    return out


def _branch(entries: list[Entry]) -> list[Entry]:
    kept: list[Entry] = []
    for entry in entries:
        if entry["kind"] == "rewind":
            to = int(entry["body"].get("to", 0))
            kept = [one for one in kept if one["position"] <= to]
        kept.append(entry)
    return kept


def _compacted(branch: list[Entry]) -> tuple[list[Entry], str]:
    compact = [e for e in branch if e["kind"] == "compact"]
    if not compact:
        return branch, ""
    to = int(compact[-1]["body"].get("to", 0))
    return [e for e in branch if e["position"] > to], str(compact[-1]["body"].get("summary", ""))


def _show(entry: Entry, branch: list[Entry], index: int, out: list[Message]) -> None:
    kind, body = entry["kind"], entry["body"]
    if kind == "user" or (kind == "answer" and not body.get("hidden")):
        out.append({"role": "user", "text": str(body.get("text", ""))})
    elif kind == "assistant":
        _show_assistant(entry, branch, index, out)
    elif kind == "tool.settled":
        if _seen_doubt(branch, index, entry["ref"]):
            out.append(_note(f"call {entry['ref']}, whose outcome was unknown, is settled: {body.get('output', '')}"))
    else:
        text = _told(kind, body)
        if text:
            out.append(_note(text))


def _show_assistant(entry: Entry, branch: list[Entry], index: int, out: list[Message]) -> None:
    body = entry["body"]
    calls = [call for call in body.get("tool_calls") or [] if call.get("id")]
    text = str(body.get("text", ""))
    if not calls:
        if text:
            out.append({"role": "assistant", "text": text})
        return
    out.append({"role": "assistant", "text": text, "tool_calls": calls})
    for call in calls:
        output, error = _outcome(branch, index, str(call["id"]))
        message: Message = {"role": "tool", "tool_call_id": call["id"], "name": call.get("name", ""), "text": output}
        if error:
            message["error"] = True
        out.append(message)


def _outcome(branch: list[Entry], index: int, call_id: str) -> tuple[str, bool]:
    """Return the text and whether it is a failure, as known before the model was asked again."""
    started, doubt, cut = False, "", ""
    asked_again = False
    for entry in branch[index + 1 :]:
        kind, body = entry["kind"], entry["body"]
        asked_again = asked_again or kind == "assistant"
        if entry["ref"] == call_id and kind in OUTCOMES:
            if kind == "tool.doubt":
                doubt = f"{DOUBT} ({body.get('reason', '')})"
            elif not (doubt and asked_again):
                return str(body.get("output", "")), bool(body.get("error"))
        elif kind == "tool.start" and entry["ref"] == call_id:
            started = body.get("effect") == "once"
        elif kind == "fork" and "parent" in body and not cut:
            cut = NOT_IN_BRANCH
        elif kind == "turn.cut" and not cut:
            cut = NOT_IN_BRANCH if body.get("cause") == "fork" else f"cut: {body.get('cause', '')}, not run"
    if doubt:
        return doubt, True
    if cut == NOT_IN_BRANCH:
        return cut, True
    if started:
        return DOUBT, True
    return cut or NO_RESULT, True


def _seen_doubt(branch: list[Entry], index: int, call_id: str) -> bool:
    doubted = False
    for entry in branch[:index]:
        if entry["kind"] == "tool.doubt" and entry["ref"] == call_id:
            doubted, asked = True, False
        elif doubted and entry["kind"] == "assistant":
            asked = True
    return doubted and asked


def _told(kind: str, body: dict[str, Any]) -> str:
    if kind == "turn.cut":
        detail = f": {body['detail']}" if body.get("detail") else ""
        return f"The work was cut off ({body.get('cause', 'unknown')}{detail})."
    if kind == "turn.end" and body.get("status") in ("failed", "cancelled"):
        error = f": {body['error']}" if body.get("error") else ""
        return f"The turn {body['status']}{error}."
    if kind == "machine.restore" and (body.get("stale") or (int(body.get("rung", 1)) >= 4 and body.get("position"))):
        return f"The machine was restored. {body.get('lost') or 'It is older than this conversation.'}"
    if kind == "machine.lost":
        return f"The machine was lost ({body.get('why', '')}). {body.get('lost', '')}".rstrip()
    return ""


def _note(text: str) -> Message:
    return {"role": "user", "text": PREFIX + text, "note": True}


def to_openai(neutral: list[Message]) -> list[Message]:
    """Return the messages in the OpenAI chat format."""
    return [_openai(one) for one in neutral]


def _openai(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "tool", "tool_call_id": message["tool_call_id"], "content": message["text"]}
    out: Message = {"role": message["role"], "content": message["text"]}
    if message.get("tool_calls"):
        out["content"] = message["text"] or None
        out["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call.get("name", ""), "arguments": _arguments(call.get("arguments"))},
            }
            for call in message["tool_calls"]
        ]
    return out


def _arguments(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value if value is not None else {}, ensure_ascii=False)
