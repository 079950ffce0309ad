"""Targets for fuzzers whose bytes come from a machine or its VMM: the guest link, the broker's proxy port, gVisor's device
state, Firecracker's message about its memory. Rules as in `recess.testing.fuzz`, which lists them.
"""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from recess.broker.dial import Pipe
from recess.broker.policy import build_policy
from recess.broker.proxy import Surroundings, serve
from recess.broker.rules import Address, plain_address
from recess.broker.secrets import SecretStore
from recess.broker.targets import Target
from recess.broker.wire import GuestSide
from recess.drivers.firecracker.faults import parse_regions
from recess.drivers.gvisor import pages
from recess.errors import RecessError, Refused, Unavailable
from recess.guestlink import wire
from recess.guestlink.channel import Channel
from recess.guestlink.frames import Decoder
from recess.guestlink.hello import greet
from recess.guestlink.link import ByteStream
from recess.machines.contract import PageSet
from recess.units import MIB, PAGE_BYTES

_PATIENCE_S = 20.0  # for a wait that an end of input must end
_STATE_PAGES = 64
_OWN_PAGES = 3
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def page_faults(data: bytes) -> None:
    """What Firecracker says of its memory before it asks for pages."""
    for size in (PAGE_BYTES, MIB):
        with suppress(RecessError):
            regions = parse_regions(data, size)
            assert sum(count for _, _, count in regions) * PAGE_BYTES == size


def gvisor_state(data: bytes) -> None:
    """A gVisor device state, and its image laid out for `runsc`, over three pages of a snapshot."""
    index = np.arange(_OWN_PAGES, dtype="<u4").tobytes()
    memory = PageSet(memoryview(index), memoryview(bytes(range(256)) * (_OWN_PAGES * PAGE_BYTES // 256)))
    with suppress(RecessError), tempfile.TemporaryDirectory() as temp:
        pages.unpack(Path(temp) / "image", data, memory, None, _STATE_PAGES)


def proxy(data: bytes) -> None:
    """What a guest says to the broker's proxy port; where a rule allows it, an upstream answers."""
    asyncio.run(_ask(data))


class _Said(ByteStream):
    """A guest's stream: what it said, in two pieces; what it is told goes nowhere."""

    def __init__(self, data: bytes) -> None:
        self._pieces = [data[: len(data) // 2], data[len(data) // 2 :]]

    async def read(self, limit: int = 65536) -> bytes:
        """Return the next piece, b"" at the end."""
        await asyncio.sleep(0)
        while self._pieces:
            piece, rest = self._pieces[0][:limit], self._pieces[0][limit:]
            self._pieces[:1] = [rest] if rest else []
            if piece:
                return piece
        return b""

    async def write(self, data: bytes) -> None:
        """Take it."""

    async def close_write(self) -> None:
        """Nothing is there to close."""

    async def close(self) -> None:
        """The same."""


class _Upstreams:
    """Names that mean one address, and an upstream there that answers once."""

    async def resolve(self, host: str, port: int) -> list[Address]:
        """Return the address, for a name that is allowed."""
        if not host.endswith("test"):
            raise Unavailable("no such name")
        return [plain_address("192.0.2.1")]

    async def connect(self, address: Address, port: int, tls_host: str) -> Pipe:
        """Return a connection that has answered already."""
        reader = asyncio.StreamReader()
        reader.feed_data(_ANSWER)
        reader.feed_eof()
        return reader, _connected(reader)


def _no_tls(host: str | Address) -> ssl.SSLContext:
    raise Refused(f"no TLS for {host} here")


async def _sibling(name: str, port: int) -> Pipe:
    if name != "other":
        raise Unavailable("no such machine")
    return await _Upstreams().connect(plain_address("192.0.2.1"), port, "")


def _note(_method: str, _target: Target | None, _allowed: bool, _reason: str) -> None:
    return


async def _ask(data: bytes) -> None:
    routes = {"llm": "https://llm.test/v1"}
    policy = build_policy(
        allow=["*.test", "192.0.2.1", "other.recess.internal:80"], routes=routes, secrets=["key@key.test"]
    )
    around = Surroundings(
        may_act=lambda: True, policy=lambda: policy, note=_note, secrets=SecretStore(extra={"key": "value-of-it"}),
        dialer=_Upstreams(), tls_context=_no_tls, sibling=_sibling,
    )  # fmt: skip
    with suppress(RecessError):
        async with asyncio.timeout(_PATIENCE_S):
            await serve(GuestSide(_Said(data)), around)


def guest(data: bytes) -> None:
    """What a guest says: its hello, then frames to a host that has asked, pinged, and has streams and a job open."""
    asyncio.run(_hear(data))


class _Sink(asyncio.Transport):
    """A transport whose other end takes everything."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol: asyncio.Protocol | None = protocol
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take it."""

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self._protocol is None

    def close(self) -> None:
        """Tell the protocol."""
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(None)

    def abort(self) -> None:
        """The same."""
        self.close()

    def can_write_eof(self) -> bool:
        """It is closed whole."""
        return False

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0


def _connected(reader: asyncio.StreamReader) -> asyncio.StreamWriter:
    protocol = asyncio.StreamReaderProtocol(reader)
    return asyncio.StreamWriter(_Sink(protocol), protocol, reader, asyncio.get_running_loop())


async def _hear(data: bytes) -> None:
    early = asyncio.StreamReader()
    early.feed_data(data)
    early.feed_eof()
    writer = _connected(early)
    with suppress(RecessError):
        await greet(early, writer, Decoder(), _PATIENCE_S)
    writer.close()
    reader = asyncio.StreamReader()
    channel = Channel(reader, _connected(reader), Decoder(), wire.Hello(wire.PROTO, "nonce"), [])

    async def serve(_service: str, _meta: object, stream: ByteStream) -> None:
        while await stream.read():
            pass

    channel.serve_incoming(serve)
    working = asyncio.all_tasks() - {asyncio.current_task()}  # one that ends with an error would be forgotten
    asked = [channel.ask({"op": "stats"})[1] for _ in range(3)]
    stream, job = channel.new_stream(), channel.new_job()
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        if channel.failure is None:  # else it is closed
            reader.feed_data(piece)
        for _ in range(3):  # its turn to read, and that of those who wait for what it read
            await asyncio.sleep(0)
            working |= asyncio.all_tasks() - {asyncio.current_task()}
    if channel.failure is None:
        reader.feed_eof()
    for waiting in (stream.read_all(MIB, _PATIENCE_S), job.wait(), *asked):
        with suppress(RecessError):
            async with asyncio.timeout(_PATIENCE_S):
                await waiting
    await channel.close()
    for outcome in await asyncio.gather(*working, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(
            outcome, RecessError | OSError | asyncio.CancelledError
        ):
            raise outcome
