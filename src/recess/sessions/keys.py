"""Keys of owner entries, derived by the host from what an entry says and never from the attempt that says it.

So a request that is sent again after a thaw, a crash or a lost reply finds its old position, and a copy of guest memory
cannot forge another session's keys. Pure.
"""

from __future__ import annotations

from blake3 import blake3

from recess.sessions.protocol import Request


def entry_key(request: Request) -> str:
    """Return the key of an agent's append, or "" for one that may repeat (it carries no serial)."""
    turn = request.turn
    match request.kind:
        case "assistant":
            return f"t{turn}/p{int(request.body.get('part', 0))}/assistant"
        case "tool.start" | "tool.result" | "tool.doubt" | "tool.settled":
            return f"t{turn}/{request.ref}/{request.kind.removeprefix('tool.')}"
        case "ask" | "timer":
            return f"t{turn}/{request.kind}/{request.ref}"
    return f"t{turn}/{request.kind}/{request.serial}" if request.serial else ""


def start_key(turn: int, attempt: int) -> str:
    """Return the key of a turn.start."""
    return f"t{turn}/start/{attempt}"


def end_key(turn: int) -> str:
    """Return the key of a turn.end."""
    return f"t{turn}/end"


def child_id(session: str, turn: int, ref: str) -> str:
    """Return the id of the child session that this turn starts under this ref: the same at every try."""
    return "ses_" + blake3(f"{session}\0{turn}\0{ref}".encode()).hexdigest()[:26]


def call_key(session: str, turn: int, call_id: str) -> str:
    """Return what a `keyed` or `once` tool hands to its provider: the same at every try, other in every session."""
    return "rck_" + blake3(f"{session}\0{turn}\0{call_id}".encode()).hexdigest()[:40]
