"""A small streaming client for OpenAI-compatible chat endpoints: no dependency, one function.

`base_url` is a plain HTTP route of the machine's broker (the default comes from OPENAI_BASE_URL), which adds the key
and speaks TLS: no secret enters this process. A blocking `http.client` runs in a thread, events cross by a queue.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

LINE_BYTES_MAX = 1024 * 1024
ERROR_BYTES_MAX = 4096
_DONE = object()


class ModelError(Exception):
    """The endpoint refused or broke off; `status` is 0 when there was no answer. `retryable` says if later may help."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = status in (0, 408, 409, 429) or status >= 500


async def openai_chat(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    model: str = "",
    base_url: str = "",
    timeout_s: float = 600.0,
    headers: dict[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of one streamed chat completion. Raises ModelError.

    `model` and `base_url` default to OPENAI_MODEL and OPENAI_BASE_URL. `options` go into the request's body.
    """
    base = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    body: dict[str, Any] = {"model": model or os.environ.get("OPENAI_MODEL") or "gpt-4o-mini", "messages": messages}
    body.update({"stream": True, "stream_options": {"include_usage": True}}, **options)
    if tools:
        body["tools"] = tools
    queue: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    connection = _connect(base, timeout_s)

    def put(item: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> None:
        try:
            _stream(connection, base, body, headers or {}, put)
            put(_DONE)
        except ModelError as exc:
            put(exc)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as exc:
            # AttributeError: http.client's way of saying that the other thread closed the connection.
            put(ModelError(f"model endpoint: {type(exc).__name__}: {exc}"))

    threading.Thread(target=work, name="openai-chat", daemon=True).start()
    try:
        while True:
            item = await queue.get()
            if item is _DONE:
                return
            if isinstance(item, ModelError):
                raise item
            yield item
    finally:
        connection.close()


def _connect(base: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(f"not a base URL: {base!r}", status=400)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, parts.port, timeout=timeout_s)


def _stream(
    connection: http.client.HTTPConnection, base: str, body: dict[str, Any], headers: dict[str, str], put: Any
) -> None:
    sent = {"Content-Type": "application/json", "Accept": "text/event-stream", **headers}
    key = os.environ.get("OPENAI_API_KEY")
    if key and "Authorization" not in sent:
        sent["Authorization"] = f"Bearer {key}"
    path = urlsplit(base).path.rstrip("/") + "/chat/completions"
    connection.request("POST", path, json.dumps(body).encode(), sent)
    response = connection.getresponse()
    if response.status != 200:
        text = response.read(ERROR_BYTES_MAX).decode("utf-8", "replace")
        raise ModelError(f"model endpoint answered {response.status}: {text.strip()}", response.status)
    if "text/event-stream" not in (response.getheader("Content-Type") or ""):
        put(json.loads(response.read()))
        return
    while True:
        line = response.readline(LINE_BYTES_MAX)
        if not line:
            raise ModelError("model endpoint: the stream ended before [DONE]")
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ModelError(f"model endpoint: {event['error']}")
        put(event)
