"""A byte channel that outlasts its connections: they come and go, the link above it sees none of it.

Some machines keep no connection to the host over a snapshot, so their driver takes the connection away before one and
makes another after it. What is written meanwhile waits here. This module knows bytes; how a connection is made, and how
it is ended without losing any, is its user's.
"""

from __future__ import annotations

import asyncio
from typing import Any


class LastingTransport(asyncio.Transport):
    """The transport that the link has. Without a connection it keeps what is written."""

    def __init__(self, protocol: asyncio.StreamReaderProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.below: asyncio.Transport | None = None
        self.held = bytearray()
        self.reading = True
        self.closed = False

    def join(self, below: asyncio.Transport) -> None:
        """Go on over a new connection."""
        self.below = below
        if not self.reading:
            below.pause_reading()
        held, self.held = self.held, bytearray()
        if held:
            below.write(held)

    def end(self, error: Exception | None = None) -> None:
        """The channel is gone for good. May be called twice."""
        if not self.closed:
            self.closed = True
            self.protocol.connection_lost(error)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or keep (what may be under way is bounded by the protocol's credit)."""
        if self.below is None:
            self.held += data
        else:
            self.below.write(data)

    def get_write_buffer_size(self) -> int:
        """Return the bytes not yet given to the kernel."""
        return len(self.held) + (0 if self.below is None else self.below.get_write_buffer_size())

    def close(self) -> None:
        """Close."""
        self.abort()

    def abort(self) -> None:
        """Close without sending what is left."""
        if self.below is not None:
            self.below.abort()
        self.end()

    def is_closing(self) -> bool:
        """Tell whether it is closed."""
        return self.closed

    def can_write_eof(self) -> bool:
        """There is no half-closing here."""
        return False

    def pause_reading(self) -> None:
        """Stop reading, over connections to come, too."""
        self.reading = False
        if self.below is not None:
            self.below.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self.reading = True
        if self.below is not None:
            self.below.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """There is nothing to tell."""
        return default


class Carrier(asyncio.Protocol):
    """One connection that carries the channel. `gone` is set when it is closed; set `leaving` before you close it."""

    def __init__(self, lasting: LastingTransport) -> None:
        self._lasting = lasting
        self.leaving = False
        self.gone = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Pass it up."""
        self._lasting.protocol.data_received(data)

    def pause_writing(self) -> None:
        """Pass it up."""
        self._lasting.protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass it up."""
        self._lasting.protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Without our asking, the channel ends with it."""
        self.gone.set()
        if not self.leaving:
            self._lasting.end(exc)
