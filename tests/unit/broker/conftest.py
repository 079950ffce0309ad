"""A broker behind a loopback port, an upstream that records what reaches it, and a gate a test can close."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from recess.broker import Broker, SecretStore, build_policy
from recess.clock import SystemClock
from recess.testing.proxy_port import ProxyPort


class SwitchGate:
    """Open until `close` is called, and again after `open`."""

    def __init__(self) -> None:
        self._lost = asyncio.Event()

    def may_act(self, machine_id: str, epoch: int) -> bool:
        return not self._lost.is_set()

    async def wait_lost(self, machine_id: str, epoch: int) -> None:
        await self._lost.wait()

    def close(self) -> None:
        self._lost.set()

    def open(self) -> None:
        self._lost.clear()


class Upstream:
    """A raw HTTP upstream: keeps each request's bytes, answers with what the test's function writes."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.port = 0
        self.respond: Callable[[asyncio.StreamWriter], Awaitable[None]] = self._ok
        self.read_body = True

    async def _ok(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            body = b""
            for line in head.lower().split(b"\r\n"):
                if self.read_body and line.startswith(b"content-length:"):
                    body = await reader.readexactly(int(line.split(b":")[1]))
                if self.read_body and line.startswith(b"transfer-encoding:"):
                    body = await reader.readuntil(b"0\r\n\r\n")
            self.requests.append(head + body)
            await self.respond(writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Guest:
    """One connection to the proxy port, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Send a request, return status, header block, and body up to its length or the end of the connection."""
        self.writer.write(request)
        await self.writer.drain()
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = [int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")]
        body = await (self.reader.readexactly(length[0]) if length else self.reader.read())
        return int(head.split()[1]), head, body


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    up = Upstream()
    server = await asyncio.start_server(up.serve, "127.0.0.1", 0)
    up.port = server.sockets[0].getsockname()[1]
    yield up
    server.close()


@pytest.fixture
async def gate() -> SwitchGate:
    return SwitchGate()


@pytest.fixture
async def broker(gate: SwitchGate, upstream: Upstream) -> Broker:
    """A broker whose machine m1 has a route `llm` (with its secret) and a rule for the upstream's port."""
    made = Broker(gate, SecretStore(extra={"llm": "sk-secret"}), SystemClock())
    base = f"http://127.0.0.1:{upstream.port}"
    made.register("m1", 1, build_policy([f"127.0.0.1:{upstream.port}"], {"llm": f"{base}/v1", "bare": base}))
    return made


@pytest.fixture
async def connect(broker: Broker) -> AsyncIterator[Callable[[], Awaitable[Guest]]]:
    opened: list[asyncio.StreamWriter] = []
    async with ProxyPort(broker.handler("m1")) as port:

        async def dial() -> Guest:
            reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
            opened.append(writer)
            return Guest(reader, writer)

        yield dial
        for writer in opened:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
