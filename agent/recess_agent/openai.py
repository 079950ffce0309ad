"""A small streaming client for OpenAI-compatible chat endpoints: no dependency, one function.

`base_url` is a plain HTTP route of the machine's broker (the default comes from OPENAI_BASE_URL), which adds the key
and speaks TLS: no secret enters this process. A blocking `http.client` runs in a thread, events cross by a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

LINE_BYTES_MAX = 1024 * 1024
ERROR_BYTES_MAX = 4096
RETRY_S = 0.5
PATIENCE_S = 10.0
RETRY_AFTER_MOST_S = 366 * 24 * 3600.0
_DONE = object()


class ModelError(Exception):
    """The endpoint refused or broke off; `status` is 0 when there was no answer. `retryable` says if later may help,
    `retry_after` (seconds) when, if the endpoint said so: `await session.retry_after(error)` waits for it."""

    def __init__(self, message: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.retryable = status in (0, 408, 409, 429) or status >= 500


async def openai_chat(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    model: str = "",
    base_url: str = "",
    timeout_s: float = 600.0,
    headers: dict[str, str] | None = None,
    retries: int = 4,
    **options: Any,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of one streamed chat completion. Raises ModelError.

    `model` and `base_url` default to OPENAI_MODEL and OPENAI_BASE_URL. `options` go into the request's body. A failure
    that may pass (no connection, a cut stream, 429, 5xx) is tried again up to `retries` times, 0.5 s later, then 1, 2, 4;
    when pieces were yielded already, `{"restart": True}` says that the answer begins afresh (`Session.stream` knows). An
    endpoint that asks for more patience than that is not tried again here: the error says how long (`retry_after`).
    """
    base = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    body: dict[str, Any] = {"model": model or os.environ.get("OPENAI_MODEL") or "gpt-4o-mini", "messages": messages}
    body.update({"stream": True, "stream_options": {"include_usage": True}}, **options)
    if tools:
        body["tools"] = tools
    for attempt in range(retries + 1):
        yielded = False
        try:
            async for event in _attempt(base, body, headers or {}, timeout_s):
                yield event
                yielded = True
            return
        except ModelError as exc:
            delay = RETRY_S * 2**attempt
            if not exc.retryable or attempt == retries or (exc.retry_after or 0.0) > PATIENCE_S:
                raise
            delay = max(delay, exc.retry_after or 0.0)
        if yielded:
            yield {"restart": True}
        await asyncio.sleep(delay)


async def _attempt(base: str, body: dict[str, Any], headers: dict[str, str], timeout_s: float) -> AsyncIterator[Any]:
    queue: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    exchange = _Exchange(_connect(base, timeout_s))

    def put(item: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> None:
        try:
            exchange.run(base, body, headers, put)
            put(_DONE)
        except ModelError as exc:
            put(exc)
        except (OSError, http.client.HTTPException, ValueError) as exc:
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
        exchange.abort()


def _connect(base: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(f"not a base URL: {base!r}", status=400)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, parts.port, timeout=timeout_s)


class _Exchange:
    """One request and its streamed answer, run in a thread; `abort` from another thread ends its wait."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._socket: socket.socket | None = None

    def abort(self) -> None:
        """Cut the socket under the reader, which then closes everything. Harmless when it has ended."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def run(self, base: str, body: dict[str, Any], headers: dict[str, str], put: Any) -> None:
        """Put each event; raises ModelError and what http.client raises."""
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            self._run(base, body, headers, put)
        finally:
            self._connection.close()

    def _run(self, base: str, body: dict[str, Any], headers: dict[str, str], put: Any) -> None:
        sent = {"Content-Type": "application/json", "Accept": "text/event-stream", **headers}
        key = os.environ.get("OPENAI_API_KEY")
        if key and "Authorization" not in sent:
            sent["Authorization"] = f"Bearer {key}"
        path = urlsplit(base).path.rstrip("/") + "/chat/completions"
        self._connection.request("POST", path, json.dumps(body).encode(), sent)
        # Closed by hand: a response without a length takes the socket over from its connection.
        with self._connection.getresponse() as response:
            _read(response, put)


def _read(response: http.client.HTTPResponse, put: Any) -> None:
    if response.status != 200:
        text = response.read(ERROR_BYTES_MAX).decode("utf-8", "replace")
        later = retry_seconds(response.getheader("Retry-After") or "", time.time())
        raise ModelError(f"model endpoint answered {response.status}: {text.strip()}", response.status, later)
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


def retry_seconds(header: str, now: float) -> float | None:
    """Return what a Retry-After header asks for (RFC 9110: seconds, or an HTTP date), None if it says nothing usable."""
    text = header.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), RETRY_AFTER_MOST_S)
    try:
        then = parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return min(max(0.0, then - now), RETRY_AFTER_MOST_S)
