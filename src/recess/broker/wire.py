"""HTTP/1.1 framing on both sides of the broker: h11's two state machines over a guest stream and an upstream socket.

h11 parses and frames, sans I/O; this module moves bytes with backpressure and bounds what is held. Every incomplete
header block is capped (h11 raises), bodies are never collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

import h11

from recess.broker.targets import Header
from recess.guestlink.link import ByteStream

HEADER_BYTES_MAX = 32 * 1024
READ_BYTES = 64 * 1024
LINGER_BYTES = 1 << 20
LINGER_S = 2.0


class GuestSide:
    """The guest's connection: we are its HTTP server."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_BYTES_MAX)
        self.responded = False  # a response has begun in this cycle
        self._method = b""

    async def next_event(self) -> h11.Event | type[h11.PAUSED]:
        """Return the next event of the guest's request. Raises h11.RemoteProtocolError, GuestFailed."""
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Request):
                self._method = event.method
            if isinstance(event, h11.Event):
                return event
            if event is h11.PAUSED:
                return h11.PAUSED
            if self.http.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[]))
            self.http.receive_data(await self.stream.read(READ_BYTES))

    async def send(self, event: h11.Event) -> None:
        """Frame and write one event, waiting for the guest's credit."""
        if isinstance(event, h11.Response):
            self.responded = True
        data = self.http.send(event)
        if data:
            await self.stream.write(data)

    async def send_problem(self, status: int, problem: Mapping[str, Any]) -> None:
        """Answer with one problem body (RFC 9457), and close after it: the request's body may be unread."""
        title = {400: "Bad request", 403: "Refused", 404: "Not found", 502: "Bad upstream", 504: "Timeout"}
        body = {"type": "about:blank", "title": title.get(status, "Unavailable"), "status": status, **problem}
        data = (json.dumps(body) + "\n").encode()
        headers = [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(data))),
            ("Connection", "close"),
            ("Via", "1.1 recess-broker"),
        ]
        await self.send(h11.Response(status_code=status, headers=headers))
        if self._method != b"HEAD":
            await self.send(h11.Data(data=data))
        await self.send(h11.EndOfMessage())

    async def linger(self) -> None:
        """Read on for a bounded while after a last answer: closing over unread bytes would reset the connection
        and could take the answer away from the guest before it was read."""
        await self.stream.close_write()
        left = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0 and (data := await self.stream.read(READ_BYTES)):
                    left -= len(data)

    def next_cycle(self) -> bool:
        """Get ready for the next request on this connection; False if it must be closed."""
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
            self.responded = False
            return True
        return False

    def take_trailing(self) -> bytes:
        """Return what the guest sent after CONNECT's header block."""
        return self.http.trailing_data[0]


class UpstreamSide:
    """A connection to an upstream: we are its HTTP client, for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEADER_BYTES_MAX)

    async def send(self, event: h11.Event) -> None:
        """Frame and write one event, waiting while the upstream is slow to take it."""
        data = self.http.send(event)
        if data:
            self.writer.write(data)
            await self.writer.drain()

    async def next_event(self) -> h11.Event | type[h11.PAUSED]:
        """Return the next event of the response. Raises h11.RemoteProtocolError, OSError."""
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Event):
                return event
            if event is h11.PAUSED:
                return h11.PAUSED
            self.http.receive_data(await self.reader.read(READ_BYTES))


def response_to_guest(response: h11.Response, headers: list[Header]) -> h11.Response:
    """Return the upstream's response with the headers that may pass."""
    return h11.Response(
        status_code=response.status_code, headers=[*headers, (b"Via", b"1.1 recess-broker")], reason=response.reason
    )
