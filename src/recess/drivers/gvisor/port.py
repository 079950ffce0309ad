"""The host's end of the guest channel: one lasting byte channel over relays that come and go.

A machine keeps no connection to the host over an image, so the driver takes the relay (`runsc exec … guestd --relay`)
away before one and starts another after it. The link above sees none of it: what it writes meanwhile waits here, and a
relay that leaves in order loses nothing (guest/guestd/src/machine.rs). This module knows nothing of frames.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from recess.drivers.gvisor.runsc import end_process
from recess.errors import DriverFailed, Timeout
from recess.guestlink.client import Link, connect
from recess.guestlink.lasting import Carrier, LastingTransport

StartRelay = Callable[[socket.socket], Awaitable[asyncio.subprocess.Process]]
"""Starts a relay whose standard input and output are this socket, and returns its process."""

_LEAVE_TIMEOUT_S = 5.0


class Port:
    """The channel of one machine. `attach` first; then `link` speaks to guestd."""

    def __init__(self, start_relay: StartRelay, *, hello_timeout_s: float) -> None:
        self._start_relay = start_relay
        self._hello_timeout_s = hello_timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        self._lasting = LastingTransport(protocol)
        protocol.connection_made(self._lasting)
        self._writer = asyncio.StreamWriter(self._lasting, protocol, self._reader, self._loop)
        self._relay: Carrier | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._link: Link | None = None

    @property
    def link(self) -> Link:
        """The link. Raises DriverFailed before guestd has said hello."""
        if self._link is None:
            raise DriverFailed("guestd has not connected")
        return self._link

    async def attach(self) -> None:
        """Start a relay and go on over it; the first time, say hello. No-op while there is one. Raises what starting it
        raises, GuestFailed, Timeout."""
        if self._relay is None:
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    self._process = await self._start_relay(theirs)
                relay = Carrier(self._lasting)
                below, _ = await self._loop.create_connection(lambda: relay, sock=ours)
            except BaseException:
                ours.close()
                raise
            self._relay = relay
            self._lasting.join(below)
        if self._link is None:
            self._link = await connect(self._reader, self._writer, hello_timeout_s=self._hello_timeout_s)

    async def leave(self) -> None:
        """Take the relay away in order: all that was sent is delivered, all that was on its way has come. No-op without
        one. Raises Timeout when the guest does not let it go; the channel is then gone for good."""
        relay, process, below = self._relay, self._process, self._lasting.below
        if relay is None or below is None or process is None:
            return
        relay.leaving = True
        self._relay = self._process = self._lasting.below = None
        try:
            below.resume_reading()
            if not below.is_closing():
                below.write_eof()
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await relay.gone.wait()
                await process.wait()
        except TimeoutError as exc:
            self._lasting.end()
            raise Timeout(f"the guest channel could not be put away within {_LEAVE_TIMEOUT_S:g} s") from exc
        finally:
            below.abort()
            await end_process(process)

    async def close(self) -> None:
        """Cut the link. May be called twice."""
        process, self._process, self._relay = self._process, None, None
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        self._lasting.abort()
        if process is not None:
            await end_process(process)
