"""In-memory two-way byte streams with a bounded buffer: what a guest link's streams look like to both ends.

Used by the fake driver only. It must know nothing of guests or VMs.
"""

from __future__ import annotations

import asyncio

from recess.errors import GuestFailed

BUFFER_BYTES = 256 * 1024


class _Pipe:
    """One direction: bytes in order, a bounded buffer, an end."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ended = False
        self._cut = False
        self._changed = asyncio.Condition()

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        async with self._changed:
            while view:
                await self._changed.wait_for(lambda: len(self._data) < BUFFER_BYTES or self._ended or self._cut)
                if self._ended or self._cut:
                    raise GuestFailed("the stream is closed")
                room = BUFFER_BYTES - len(self._data)
                self._data += view[:room]
                view = view[room:]
                self._changed.notify_all()

    async def read(self, limit: int) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._data) or self._ended or self._cut)
            if self._cut and not self._data:
                raise GuestFailed("the stream was cut")
            out = bytes(self._data[:limit])
            del self._data[:limit]
            self._changed.notify_all()
            return out

    async def end(self, *, cut: bool = False) -> None:
        async with self._changed:
            self._ended = True
            self._cut = self._cut or cut
            self._changed.notify_all()


class MemoryStream:
    """One end of a pair; fulfils `recess.guestlink.link.ByteStream`."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def read(self, limit: int = 65536) -> bytes:
        """Return some bytes, b"" at the end; raises GuestFailed when the stream was cut."""
        return await self._incoming.read(limit)

    async def write(self, data: bytes) -> None:
        """Send all, waiting for room."""
        await self._outgoing.write(data)

    async def close_write(self) -> None:
        """Half-close."""
        await self._outgoing.end()

    async def close(self) -> None:
        """Close both ways; may be called twice."""
        await self._outgoing.end()
        await self._incoming.end()

    async def cut(self) -> None:
        """Break both ways, as a lost link does: readers see an error once the buffer is empty."""
        await self._outgoing.end(cut=True)
        await self._incoming.end(cut=True)


def stream_pair() -> tuple[MemoryStream, MemoryStream]:
    """Return two connected ends."""
    one, two = _Pipe(), _Pipe()
    return MemoryStream(one, two), MemoryStream(two, one)
