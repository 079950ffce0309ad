"""The host's end of the agent protocol: lines in, typed requests out (docs/internals/agent-protocol.md).

Everything here comes from a guest: lengths, kinds, numbers and strings are checked before use, and a line that does
not parse ends the stream. This module must know nothing of the log (but the words of a blob) or of machines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.contextlog.blobs import check_word
from recess.errors import BadInput, GuestFailed
from recess.guestlink.link import ByteStream

PROTOCOL = 1
LINE_BYTES_MAX = 8 * 1024 * 1024
TEXT_MAX = 4096
REF_MAX = 160  # a key is made of it, and a key holds 256
DELTA_CHARS_MAX = 256 * 1024
WAIT_REFS_MAX = 16
CHOICES_MAX = 32
TIMER_S_MAX = 366 * 24 * 3600.0
AGENT_KINDS = frozenset(
    {
        "assistant",
        "tool.start",
        "tool.result",
        "tool.doubt",
        "tool.settled",
        "note",
        "system",
        "compact",
        "ask",
        "timer",
    }
)
_CUSTOM_KIND = re.compile(r"x\.[a-z0-9_.\-]{1,60}")


@dataclass(frozen=True)
class Hello:
    """The agent's first line. `position`: how far its copy of the log goes; `done`: the turn it has finished."""

    version: str
    job: str
    pid: int
    nonce: str
    position: int
    turn: int
    done: int
    hooks: tuple[str, ...]
    busy: bool = False


@dataclass(frozen=True)
class Request:
    """A request with an id: op is next | append | wait | spawn | fork | put | get | hold | release | crashed."""

    id: int
    op: str
    done: int = 0
    shown: int = 0  # with next: how far the finished turn's model had read
    refs: tuple[str, ...] = ()
    kind: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    ref: str = ""
    turn: int = 0
    serial: str = ""
    token: str = ""
    why: str = ""
    schema: int = 1  # of the entry's body, as the agent's code numbers it
    n: int = 0  # the piece of a blob
    last: bool = False


@dataclass(frozen=True)
class DeltaLine:
    """A piece of a streaming reply; nobody answers it."""

    turn: int
    part: int
    n: int
    text: str


@dataclass(frozen=True)
class Drop:
    """The agent does not want the answer of a `wait` any more."""

    id: int


@dataclass(frozen=True)
class Busy:
    """Whether the agent is in a model call: beside a `wait`, it then is not at rest."""

    on: bool


@dataclass(frozen=True)
class Ack:
    """The agent has done what an event asked for."""

    ack: int


Message = Hello | Request | DeltaLine | Ack | Drop | Busy


class Lines:
    """Lines of a guest's stream, bounded."""

    def __init__(self, stream: ByteStream, limit: int = LINE_BYTES_MAX) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0

    async def next(self) -> bytes:
        """Return the next line without its end, b"" at the end of the stream. Raises GuestFailed over the limit."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self._searched = 0
                if line:
                    return line
                continue
            self._searched = len(self._buffer)
            if len(self._buffer) > self._limit:
                raise GuestFailed(f"agent: a line of more than {self._limit} bytes")
            data = await self._stream.read()
            if not data:
                return b""
            self._buffer += data


def encode(message: Mapping[str, Any]) -> bytes:
    """Return one line."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def parse(line: bytes) -> Message:
    """Return the message. Raises GuestFailed when it is not one, BadInput when a request's fields are wrong."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise GuestFailed(f"agent: not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise GuestFailed("agent: a message must be an object")
    match data.get("t"):
        case "hello":
            return _hello(data)
        case "req":
            return _request(data)
        case "delta":
            text = _string(data, "text", DELTA_CHARS_MAX)
            return DeltaLine(_number(data, "turn"), _number(data, "part"), _number(data, "n"), text)
        case "ack":
            return Ack(_number(data, "ack"))
        case "drop":
            return Drop(_number(data, "id"))
        case "busy":
            return Busy(data.get("on") is True)
    raise GuestFailed(f"agent: unknown message {str(data.get('t'))[:40]!r}")


def request_id(line: bytes) -> int:
    """Return the id of a request whose other fields are wrong, so that the error can be answered; 0 if there is none."""
    try:
        data = json.loads(line)
        return int(data["id"]) if data.get("t") == "req" else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def _hello(data: dict[str, Any]) -> Hello:
    if data.get("proto") != PROTOCOL:
        raise GuestFailed(f"agent: protocol {str(data.get('proto'))[:20]}, this host speaks {PROTOCOL}")
    hooks = data.get("hooks")
    names = tuple(str(one)[:32] for one in hooks[:16]) if isinstance(hooks, list) else ()
    return Hello(
        version=_string(data, "version"), job=_string(data, "job"), pid=_number(data, "pid"),
        nonce=_string(data, "nonce"), position=_number(data, "position"), turn=_number(data, "turn"),
        done=_number(data, "done"), hooks=names, busy=data.get("busy") is True,
    )  # fmt: skip


def _request(data: dict[str, Any]) -> Request:
    number, op = _number(data, "id"), data.get("op")
    if number < 1:
        raise GuestFailed("agent: a request needs an id from 1")
    match op:
        case "next":
            return Request(number, "next", done=_number(data, "done"), shown=_number(data, "shown"))
        case "append":
            return _append(number, data)
        case "wait":
            return Request(
                number, "wait", refs=_refs(data), ref=_string(data, "call", REF_MAX), turn=_number(data, "turn")
            )
        case "spawn":
            return _spawn(number, data)
        case "fork":
            return _fork(number, data)
        case "put":
            return _put(number, data)
        case "get":
            return Request(number, "get", ref=_string(data, "hash", REF_MAX), n=_number(data, "n"))
        case "hold":
            return Request(number, "hold", token=_string(data, "token"), why=_string(data, "why"))
        case "release":
            return Request(number, "release", token=_string(data, "token"))
        case "crashed":
            return Request(number, "crashed", why=_string(data, "detail", 65536))
    raise BadInput(f"agent: unknown op {str(op)[:40]!r}")


def _append(number: int, data: dict[str, Any]) -> Request:
    kind, body = data.get("kind"), data.get("body")
    if not isinstance(kind, str) or not (kind in AGENT_KINDS or _CUSTOM_KIND.fullmatch(kind)):
        raise BadInput(f"an agent may not append {str(kind)[:40]!r}", hint="own kinds are named x.something")
    if not isinstance(body, dict):
        raise BadInput(f"{kind}: the body must be an object")
    ref = _string(data, "ref", REF_MAX)
    if kind.startswith("tool.") and not ref:
        raise BadInput(f"{kind}: ref must name the call")
    if kind == "tool.start" and body.get("effect") not in ("local", "pure", "keyed", "once"):
        raise BadInput("tool.start: effect must be local, pure, keyed or once")
    _CHECKS.get(kind, _any_body)(body)
    if kind in ("ask", "timer") and not ref:
        raise BadInput(f"{kind}: ref must name it")
    schema = _number(data, "schema") or 1
    if schema != 1 and not (kind == "note" or kind.startswith("x.")):
        raise BadInput(f"{kind}: its schema is ours to number")
    return Request(
        number, "append", kind=kind, body=body, ref=ref, turn=_number(data, "turn"), serial=_string(data, "serial"),
        schema=schema,
    )  # fmt: skip


def _spawn(number: int, data: dict[str, Any]) -> Request:
    ref, agent, text = _string(data, "ref", REF_MAX), _string(data, "agent"), _string(data, "text", LINE_BYTES_MAX)
    if not ref or not agent or not text or not _number(data, "turn"):
        raise BadInput("spawn: ref, agent, text and turn are needed")
    return Request(number, "spawn", ref=ref, body={"agent": agent, "text": text}, turn=_number(data, "turn"))


def _fork(number: int, data: dict[str, Any]) -> Request:
    ref, turn, text = _string(data, "ref", REF_MAX), _number(data, "turn"), _string(data, "text", LINE_BYTES_MAX)
    if not ref or not turn:
        raise BadInput("fork: ref and turn are needed")
    return Request(number, "fork", ref=ref, body={"text": text, "name": _string(data, "name", REF_MAX)}, turn=turn)


def _put(number: int, data: dict[str, Any]) -> Request:
    token = _string(data, "upload", REF_MAX)
    if not token:
        raise BadInput("put: upload must name it")
    facts = {name: check_word(data.get(name, ""), name) for name in ("media_type", "name")}
    body = {"data": _string(data, "data", LINE_BYTES_MAX), **facts}
    return Request(number, "put", token=token, n=_number(data, "n"), last=data.get("last") is True, body=body)


def _refs(data: Mapping[str, Any]) -> tuple[str, ...]:
    refs = data.get("refs")
    if not isinstance(refs, list) or not 1 <= len(refs) <= WAIT_REFS_MAX:
        raise BadInput(f"wait: refs must be a list of 1 to {WAIT_REFS_MAX}")
    if not all(isinstance(one, str) and 0 < len(one) <= REF_MAX for one in refs):
        raise BadInput("wait: a ref is a short string")
    return tuple(refs)


def _any_body(body: Mapping[str, Any]) -> None:
    """Nothing of this kind's body is acted on by the host."""


def _check_ask(body: Mapping[str, Any]) -> None:
    choices = body.get("choices", [])
    if not isinstance(body.get("text"), str) or not isinstance(choices, list) or len(choices) > CHOICES_MAX:
        raise BadInput(f"ask: text must be a string and choices a list of at most {CHOICES_MAX}")
    if not all(isinstance(one, str) and one for one in choices):
        raise BadInput("ask: a choice is a string")


def _check_timer(body: Mapping[str, Any]) -> None:
    seconds = body.get("seconds")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= TIMER_S_MAX:
        raise BadInput(f"timer: seconds must be a number from 0 to {TIMER_S_MAX:.0f}")


def _check_compact(body: Mapping[str, Any]) -> None:
    if not isinstance(body.get("summary"), str):
        raise BadInput("compact: summary must be a string")
    _number(body, "to")


def _check_assistant(body: dict[str, Any]) -> None:
    calls = body.get("tool_calls", [])
    if not isinstance(body.get("text"), str) or not isinstance(calls, list):
        raise BadInput("assistant: text must be a string and tool_calls a list")
    _number(body, "part")
    _number(body, "replaces")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("id"), str) or not isinstance(call.get("name"), str):
            raise BadInput("assistant: a tool call needs an id and a name")


_CHECKS = {"assistant": _check_assistant, "ask": _check_ask, "timer": _check_timer, "compact": _check_compact}


def _string(data: Mapping[str, Any], name: str, limit: int = TEXT_MAX) -> str:
    value = data.get(name, "")
    if not isinstance(value, str) or len(value) > limit:
        raise BadInput(f"agent: {name} must be a string of at most {limit} characters")
    return value


def _number(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise BadInput(f"agent: {name} must be a number from 0")
    return value
