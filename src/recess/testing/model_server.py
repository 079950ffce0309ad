"""A local model provider: `/v1/chat/completions` of the OpenAI wire protocol, streaming included, with a scripted mind.

It refuses what the real provider refuses, with the same status and shape of error: a wrong key (401: proof that the
broker put the key in), a transcript in which a tool call has no result or a result no call (400: proof that the
context log never shows a model an invalid transcript). The script is `recess.testing.model_script`.
Wire format: https://platform.openai.com/docs/api-reference/chat (chat completion and chunk objects).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from recess.testing.http_server import HttpRequest, HttpResponse, LoopbackServer, json_response
from recess.testing.model_script import Answer, reply_to

REQUESTS_KEPT = 1000
_ROLES = ("system", "developer", "user", "assistant", "tool")
_CREATED = 1_760_000_000  # a fixed date: the same transcript gives the same bytes


class InvalidRequest(Exception):
    """What the provider answers 400 to; `param` names the offending field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages if a provider would take them. Raises InvalidRequest in the provider's words."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("Invalid 'messages': expected a non-empty array.", "messages")
    open_calls: list[str] = []
    for i, message in enumerate(messages):
        where = f"messages.[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise InvalidRequest(
                f"Invalid value: {role!r}. Supported values are: {', '.join(_ROLES)}.", f"{where}.role"
            )
        if role == "tool":
            if message.get("tool_call_id") not in open_calls:
                raise InvalidRequest(
                    "Invalid parameter: messages with role 'tool' must be a response to a preceding message with "
                    "'tool_calls'.",
                    f"{where}.role",
                )
            open_calls.remove(message["tool_call_id"])
        elif open_calls:
            break
        if role != "assistant" and not isinstance(message.get("content"), str | list):
            raise InvalidRequest("Invalid value for 'content': expected a string, got null.", f"{where}.content")
        if role == "assistant":
            open_calls = _check_assistant(message, where)
    if open_calls:
        raise InvalidRequest(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(open_calls)}",
            "messages",
        )
    return messages


def _check_assistant(message: Mapping[str, Any], where: str) -> list[str]:
    calls = message.get("tool_calls")
    if calls is None:
        if not isinstance(message.get("content"), str):
            raise InvalidRequest("Invalid value for 'content': expected a string, got null.", f"{where}.content")
        return []
    if not isinstance(calls, list) or not calls:
        raise InvalidRequest(
            "Invalid 'tool_calls': empty array. Expected an array with minimum length 1, but got an empty array "
            "instead.",
            f"{where}.tool_calls",
        )
    ids: list[str] = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        good = isinstance(call, dict) and isinstance(call.get("id"), str) and call.get("type") == "function"
        if (
            not good
            or not isinstance(function, dict)
            or not all(isinstance(function.get(k), str) for k in ("name", "arguments"))
        ):
            raise InvalidRequest("Invalid 'tool_calls': id, type and function are required.", f"{where}.tool_calls")
        ids.append(call["id"])
    if len(set(ids)) != len(ids):
        raise InvalidRequest("Invalid 'tool_calls': duplicate id.", f"{where}.tool_calls")
    return ids


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Return the tools if a provider would take them. Raises InvalidRequest."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise InvalidRequest("Invalid type for 'tools': expected an array.", "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest("Missing required parameter: 'tools[].function.name'.", f"tools[{i}].function")
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise InvalidRequest("Invalid 'tools': function names must be unique.", "tools")
    return tools


def _error(status: int, message: str, param: str | None, code: str | None) -> HttpResponse:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return json_response({"error": body}, status)


class ModelServer(LoopbackServer):
    """The provider. `base_url` is what OPENAI_BASE_URL of a direct client would be; `requests` the newest bodies."""

    def __init__(self, key: str, *, port: int = 0, chunk_delay_s: float = 0.0) -> None:
        super().__init__(port)
        self._key = key
        self._chunk_delay_s = chunk_delay_s
        self.requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self.refused: deque[str] = deque(maxlen=REQUESTS_KEPT)

    @property
    def base_url(self) -> str:
        """The API's base, with its version."""
        return f"{self.url}/v1"

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Serve one call of the API."""
        if request.bearer != self._key:
            self.refused.append("key")
            shown = request.bearer[:4] + "***" if request.bearer else "(none)"
            return _error(401, f"Incorrect API key provided: {shown}.", None, "invalid_api_key")
        if (request.method, request.path) == ("GET", "/v1/models"):
            return json_response({"object": "list", "data": [{"id": "script-1", "object": "model"}]})
        if (request.method, request.path) != ("POST", "/v1/chat/completions"):
            return _error(404, f"Unknown request URL: {request.method} {request.path}.", None, "unknown_url")
        try:
            body = request.json()
            if not isinstance(body, dict) or not isinstance(body.get("model"), str):
                raise InvalidRequest("you must provide a model parameter", "model")
            messages, tools = check_messages(body.get("messages")), check_tools(body.get("tools"))
        except InvalidRequest as exc:
            self.refused.append(str(exc))
            return _error(400, str(exc), exc.param, None)
        except ValueError:
            return _error(400, "We could not parse the JSON body of your request.", None, None)
        self.requests.append(body)
        reply = self.reply(messages, tools)
        if isinstance(reply, HttpResponse):
            return reply
        if not body.get("stream"):
            return json_response(completion(body, reply))
        options = body.get("stream_options") or {}
        chunks = completion_chunks(body, reply, usage=bool(options.get("include_usage")))
        return HttpResponse(200, self._stream(chunks), "text/event-stream; charset=utf-8")

    def reply(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Answer | HttpResponse:
        """Return what the model says to a checked transcript, or another answer than the model's. The script's, here."""
        return reply_to(messages, tools)

    async def _stream(self, chunks: Sequence[Mapping[str, Any]]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
            if self._chunk_delay_s:
                await asyncio.sleep(self._chunk_delay_s)
        yield b"data: [DONE]\n\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body["messages"], sort_keys=True).encode(), digest_size=12).hexdigest()


def _calls(body: Mapping[str, Any], reply: Answer) -> list[dict[str, Any]]:
    """Return the calls with ids that depend on the transcript alone: the same question gives the same answer."""
    digest = _digest(body)
    return [
        {
            "id": f"call_{digest}{i}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for i, call in enumerate(reply.calls)
    ]


def _usage(body: Mapping[str, Any], reply: Answer) -> dict[str, int]:
    """Return token counts by a rule of thumb (4 characters a token)."""
    asked = len(json.dumps(body["messages"])) // 4
    said = (len(reply.text) + sum(len(json.dumps(c.arguments)) for c in reply.calls)) // 4 + 1
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def completion(body: Mapping[str, Any], reply: Answer) -> dict[str, Any]:
    """Return a whole chat.completion object."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = _calls(body, reply)
    finish = "tool_calls" if reply.calls else "stop"
    return {
        "id": f"chatcmpl-{_digest(body)}",
        "object": "chat.completion",
        "created": _CREATED,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": _usage(body, reply),
    }


def completion_chunks(body: Mapping[str, Any], reply: Answer, *, usage: bool) -> list[dict[str, Any]]:
    """Return the chat.completion.chunk objects of a reply: text word by word, arguments in fragments."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "" if reply.text else None}]
    deltas += [{"content": word + " "} for word in reply.text.split(" ")[:-1]]
    deltas += [{"content": word} for word in reply.text.split(" ")[-1:] if word]
    for i, call in enumerate(_calls(body, reply)):
        function = call["function"]
        first = {
            "index": i,
            "id": call["id"],
            "type": "function",
            "function": {"name": function["name"], "arguments": ""},
        }
        deltas.append({"tool_calls": [first]})
        text = function["arguments"]
        deltas += [
            {"tool_calls": [{"index": i, "function": {"arguments": text[at : at + 24]}}]}
            for at in range(0, len(text), 24)
        ]
    head = {
        "id": f"chatcmpl-{_digest(body)}",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": body["model"],
    }
    out = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    finish = "tool_calls" if reply.calls else "stop"
    out.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        out.append({**head, "choices": [], "usage": _usage(body, reply)})
    return out


async def _serve_until_interrupted(port: int, key: str) -> None:
    async with ModelServer(key, port=port) as server:
        sys.stdout.write(f"export OPENAI_BASE_URL={server.base_url} OPENAI_API_KEY={key}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C: `python -m recess.testing.model_server [PORT [KEY]]`, any port and key if none is given."""
    port = int(arguments[0]) if arguments else 0
    key = arguments[1] if len(arguments) > 1 else "sk-local-" + secrets.token_hex(12)
    try:
        asyncio.run(_serve_until_interrupted(port, key))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
