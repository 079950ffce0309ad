"""A small loopback HTTP/1.1 server for the test providers (model, payments, git): h11 for the wire, asyncio for the rest.

A subclass answers requests; a response's body may be bytes or an async iterator that is sent piece by piece. It is a
test server: loopback only, bodies capped, one request after another on a connection.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import h11

BODY_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class HttpRequest:
    """One request. Header names are lower case; `query` holds the last value of each name."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON. Raises ValueError."""
        return json.loads(self.body)

    @property
    def bearer(self) -> str:
        """The bearer token, "" if there is none."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""


@dataclass(frozen=True)
class HttpResponse:
    """One response; with an iterator as body it is sent in chunks, each as soon as it is yielded."""

    status: int = 200
    body: bytes | AsyncIterator[bytes] = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(data: Any, status: int = 200) -> HttpResponse:
    """Return data as a JSON response."""
    return HttpResponse(status, json.dumps(data).encode() + b"\n")


class LoopbackServer(abc.ABC):
    """Async context manager; `url` is its base URL while it is open. Subclasses implement `answer`."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @abc.abstractmethod
    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Return the response to a request."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = h11.Connection(h11.SERVER)
        try:
            while True:
                request = await _read_request(wire, reader)
                if request is None:
                    return
                await _write_response(wire, writer, await self.answer(request))
                if wire.our_state is not h11.DONE or wire.their_state is not h11.DONE:
                    return
                wire.start_next_cycle()
        except (OSError, h11.ProtocolError):
            return  # the client broke off: its affair
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read_request(wire: h11.Connection, reader: asyncio.StreamReader) -> HttpRequest | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_BYTES_MAX:
                raise h11.RemoteProtocolError("the body is too large", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            url = urlsplit(head.target.decode("ascii"))
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
            return HttpRequest(head.method.decode("ascii"), url.path, query, headers, bytes(body))
        else:
            return None


async def _write_response(wire: h11.Connection, writer: asyncio.StreamWriter, response: HttpResponse) -> None:
    headers = [("Content-Type", response.content_type), *response.headers.items()]
    if isinstance(response.body, bytes):
        headers.append(("Content-Length", str(len(response.body))))

    async def send(event: h11.Event) -> None:
        data = wire.send(event)
        if data:
            writer.write(data)
            await writer.drain()

    await send(h11.Response(status_code=response.status, headers=headers))
    if isinstance(response.body, bytes):
        if response.body:
            await send(h11.Data(data=response.body))
    else:
        async for piece in response.body:
            await send(h11.Data(data=piece))
    await send(h11.EndOfMessage())
