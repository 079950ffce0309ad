"""One entry of a session's log as a line for people. Pure; a kind that is unknown, or a body of another shape than
expected, is shown as JSON, never hidden. It must know nothing of servers or of what comes before or after an entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recess.cli.output import short
from recess.sdk.transport import Json
from recess.units import format_bytes, format_duration

_ARGUMENTS_MAX = 200
_TEXT_MAX = 300
_INDENT = "\n" + " " * 24


def render(entry: Json) -> str:
    """Return one entry: position, kind, and what it says."""
    try:
        text = _text(entry["kind"], entry["body"], entry["ref"])
    except (KeyError, TypeError, ValueError, AttributeError):
        text = ""
    text = (text or json.dumps(entry["body"])[:_TEXT_MAX]).rstrip().replace("\n", _INDENT)
    return f"{entry['position']:>6}  {entry['kind']:<16}  {text}".rstrip()


def _text(kind: str, body: Mapping[str, Any], ref: str) -> str:
    match kind:
        case "user" | "assistant" | "system":
            calls = ", ".join(c["name"] for c in body.get("tool_calls") or [])
            return str(body.get("text", "")) + (f" [calls {calls}]" if calls else "")
        case "tool.start":
            return f"{body['name']}({json.dumps(body.get('arguments'))[:_ARGUMENTS_MAX]})"
        case "tool.result":
            return str(body.get("output", ""))[:_TEXT_MAX]
        case "ask":
            choices = " | ".join(body.get("choices") or ())
            return f"{ref}: {body['text']}" + (f" [{choices}]" if choices else "")
        case "answer":
            return f"{ref}: {body['text']}"
        case "blob":
            about = [one for one in (body["name"], body["media_type"], format_bytes(int(body["size"]))) if one]
            return f"{body['hash'][:12]}: {', '.join(about)}"
        case "code":
            return f"{body['old'] or 'none'} -> {body['new']}"
        case "machine.snapshot":
            return _snapshot(body)
        case "machine.restore":
            return _restore(body)
    return ""


def _snapshot(body: Mapping[str, Any]) -> str:
    figures = body["figures"]
    cost = f"durable in {format_duration(figures['durable_s'])}, stored {format_bytes(int(figures['new_bytes']))}"
    return f"{body['why']}: {short(body['snapshot'])}, {cost}"


def _restore(body: Mapping[str, Any]) -> str:
    text = f"rung {body['rung']} in {format_duration(body['seconds'])}: {body['why']}"
    if body.get("stale"):
        text += f"; the machine is as of {body['position']}, the log ended at {body['head']}"
    return text + (f"; lost: {body['lost']}" if body.get("lost") else "")
