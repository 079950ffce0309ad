"""The host's end of the guest channel: the host connects to guestd's vsock port through Firecracker's socket.

No vsock connection survives a snapshot (Firecracker resets them all when one is taken), so the connection is taken away
before one and made anew after it; the link above sees none of it. Towards the guest the bytes go in pieces and an empty
piece is the leave (guest/guestd/src/vsock.rs): guestd's side then sends what it has in hand and closes, and nothing is on
its way any more in either direction.

Connecting: Firecracker's socket takes `CONNECT PORT` and a newline, and answers `OK N` once the guest has accepted; it
closes instead while nobody listens there (a kernel that still boots, a machine that is just being restored).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

from recess.drivers.firecracker.calls import GUEST_PORT, VSOCK_SOCKET
from recess.drivers.kept.layout import socket_address
from recess.errors import DriverFailed, Timeout
from recess.guestlink.client import Link, connect
from recess.guestlink.lasting import Carrier, LastingTransport

_LEAVE = bytes(4)
_LEAVE_TIMEOUT_S = 10.0
_DIAL_S = 5.0  # Firecracker gives a guest 2 s to accept
_STEP_S = 0.01
_ANSWER_MAX = 64


class _Pieces(LastingTransport):
    """The channel, with a length before everything that is written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send one piece, or keep it. An empty one would be the leave."""
        if data:
            super().write(len(data).to_bytes(4, "little") + bytes(data))


class Port:
    """The channel of one machine. `attach` first; then `link` speaks to guestd."""

    def __init__(self, run: Path, *, hello_timeout_s: float) -> None:
        self._run = run
        self._hello_timeout_s = hello_timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        self._channel = _Pieces(protocol)
        protocol.connection_made(self._channel)
        self._writer = asyncio.StreamWriter(self._channel, protocol, self._reader, self._loop)
        self._carrier: Carrier | None = None
        self._link: Link | None = None

    @property
    def link(self) -> Link:
        """The link. Raises DriverFailed before guestd has said hello."""
        if self._link is None:
            raise DriverFailed("guestd has not connected")
        return self._link

    async def attach(self) -> None:
        """Connect and go on; the first time, say hello. No-op while connected. Raises Timeout, GuestFailed."""
        if self._carrier is None:
            sock = await self._dial()
            carrier = Carrier(self._channel)
            try:
                below, _ = await self._loop.create_connection(lambda: carrier, sock=sock)
            except BaseException:
                sock.close()
                raise
            self._carrier = carrier
            self._channel.join(below)
        if self._link is None:
            self._link = await connect(self._reader, self._writer, hello_timeout_s=self._hello_timeout_s)

    async def _dial(self) -> socket.socket:
        """Return a connection that guestd has accepted. Asked again and again: that a guest listens is no event."""
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                while True:
                    sock = await self._try_dial()
                    if sock is not None:
                        return sock
                    await asyncio.sleep(_STEP_S)
        except TimeoutError as exc:
            raise Timeout(
                f"guestd did not answer within {self._hello_timeout_s:g} s",
                hint="the console may say why; a kernel without vsock cannot be reached",
            ) from exc

    async def _try_dial(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(_DIAL_S):
                with socket_address(self._run, VSOCK_SOCKET) as address:
                    await self._loop.sock_connect(sock, address)
                await self._loop.sock_sendall(sock, b"CONNECT %d\n" % GUEST_PORT)
                if (await self._answer(sock)).startswith(b"OK "):
                    return sock
        except (OSError, TimeoutError):
            pass
        except BaseException:
            sock.close()
            raise
        sock.close()
        return None

    async def _answer(self, sock: socket.socket) -> bytes:
        """Return the line that Firecracker answers, and not a byte of what follows it; less when it closes."""
        line = b""
        while not line.endswith(b"\n") and len(line) < _ANSWER_MAX:
            byte = await self._loop.sock_recv(sock, 1)
            if not byte:
                return b""
            line += byte
        return line

    async def leave(self) -> None:
        """Disconnect in order: all that was sent is delivered, all that was on its way has come. The guest must run. No-op
        when not connected. Raises Timeout when the guest does not let go; the channel is then gone for good."""
        carrier, below = self._carrier, self._channel.below
        if carrier is None or below is None:
            return
        carrier.leaving = True
        self._carrier = self._channel.below = None
        try:
            below.resume_reading()
            if not below.is_closing():
                below.write(_LEAVE)
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await carrier.gone.wait()
        except TimeoutError as exc:
            self._channel.end()
            raise Timeout(f"the guest channel could not be put away within {_LEAVE_TIMEOUT_S:g} s") from exc
        finally:
            below.abort()

    async def close(self) -> None:
        """Cut the link. May be called twice."""
        link, self._link, self._carrier = self._link, None, None
        if link is not None:
            with contextlib.suppress(Exception):
                await link.close()
        self._channel.abort()
