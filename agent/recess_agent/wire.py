"""The agent's end of the session socket: JSON lines, requests with ids, pushes, and transparent reconnection.

When the machine is frozen and thawed elsewhere, or the server restarts, the stream ends. This client then connects
again, says hello with the position its copy of the log has reached, takes the entries it missed, and sends every
unacknowledged request once more. That is safe because the host derives each entry's key from what it says and not
from the attempt: a repeated append gives the old position. So the coroutine that awaits a reply notices nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from recess_agent.quiet import no_collection

DEFAULT_SOCKET = "/run/recess/session.sock"
LINE_BYTES_MAX = 8 * 1024 * 1024
RETRY_FIRST_S = 0.01
RETRY_LAST_S = 0.5
PROTOCOL = 1

Json = dict[str, Any]
Push = Callable[[Json], Awaitable[None]]


class SessionError(Exception):
    """The host refused a request; `code` is its error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class SessionClosed(SessionError):
    """The host ended this process's part: the session is closed, or newer code has taken over."""


class Wire:
    """One logical connection that outlives its sockets. `hello` gives the fields of the hello line at that moment."""

    def __init__(self, hello: Callable[[], Json], on_push: Push, *, socket_path: str = "") -> None:
        self._path = socket_path or os.environ.get("RECESS_SESSION_SOCKET") or DEFAULT_SOCKET
        self._hello = hello
        self._on_push = on_push
        self._pending: dict[int, Json] = {}
        self._futures: dict[int, asyncio.Future[Json]] = {}
        self._next_id = 1
        self._writer: asyncio.StreamWriter | None = None
        self._ready = False
        self._closed: SessionClosed | None = None
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    async def start(self) -> None:
        """Connect and return when the host has sent all that this process missed. Raises SessionClosed."""
        self._task = asyncio.ensure_future(self._run())
        up = asyncio.ensure_future(self._up.wait())
        await asyncio.wait({up, self._task}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._closed is not None:
            raise self._closed

    async def stop(self) -> None:
        """Drop the connection; pending requests are abandoned."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def request(self, op: str, **fields: Any) -> Json:
        """Send a request and return its result, over as many sockets as it takes. Raises SessionError."""
        if self._closed is not None:
            raise self._closed
        number, self._next_id = self._next_id, self._next_id + 1
        message = {"t": "req", "id": number, "op": op, **fields}
        self._encode(message)  # refuse what is too long before it is pending for ever
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._pending[number] = message
        self._futures[number] = future
        self._send(message)
        try:
            return await future
        finally:
            self._pending.pop(number, None)
            self._futures.pop(number, None)
            if future.cancelled() and op == "wait":
                self.post({"t": "drop", "id": number})  # else the host takes this process to be at rest

    def post(self, message: Json) -> None:
        """Send without waiting for an answer; lost if there is no connection now (hello and `go_on` make up for it)."""
        self._send(message)

    def _encode(self, message: Json) -> bytes:
        line = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        if len(line) > LINE_BYTES_MAX:
            raise SessionError("bad_input", f"a message of {len(line)} bytes exceeds {LINE_BYTES_MAX}")
        return line

    def _send(self, message: Json) -> None:
        if self._ready and self._writer is not None and not self._writer.is_closing():
            self._writer.write(self._encode(message))

    async def _run(self) -> None:
        delay = RETRY_FIRST_S
        while self._closed is None:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=LINE_BYTES_MAX)
            except OSError:
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_LAST_S)
                continue
            try:
                if await self._converse(reader, writer):
                    delay = RETRY_FIRST_S
            except (OSError, ValueError, asyncio.IncompleteReadError):
                pass  # a cut stream: connect again
            finally:
                self._ready = False
                self._writer = None
                writer.close()
            if self._closed is None:
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_LAST_S)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one socket until it ends; tells whether the handshake was completed."""
        writer.write(self._encode({"t": "hello", "proto": PROTOCOL, **self._hello()}))
        greeted = False
        with contextlib.ExitStack() as past:
            past.enter_context(no_collection())
            while True:
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    return greeted
                message = json.loads(line)
                kind = message.get("t")
                if kind in ("ok", "err"):
                    self._settle(message)
                elif kind == "bye":
                    self._end(str(message.get("why", "the host said goodbye")))
                    return greeted
                elif kind == "ready":
                    greeted = True
                    past.close()
                    self._writer, self._ready = writer, True
                    await self._on_push(message)  # before the requests: a reply's pieces go before its entry
                    for number in sorted(self._pending):
                        self._send(self._pending[number])
                    self._up.set()
                else:
                    await self._on_push(message)

    def _settle(self, message: Json) -> None:
        future = self._futures.get(int(message.get("id", 0)))
        if future is None or future.done():
            return
        if message["t"] == "ok":
            future.set_result(message.get("result") or {})
        else:
            future.set_exception(SessionError(str(message.get("code", "internal")), str(message.get("message", ""))))

    def _end(self, why: str) -> None:
        self._closed = SessionClosed("closed", why)
        for future in self._futures.values():
            if not future.done():
                future.set_exception(SessionClosed("closed", why))
