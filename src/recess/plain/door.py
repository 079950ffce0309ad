"""A listening unix socket for machines that are plain processes that may be closed at any moment, in the middle of a connection too.

`asyncio.start_unix_server` may not: a connection that was accepted when its server is closed is dropped without being closed
(CPython 3.11), which is a leak and, with warnings as errors, a test that fails now and then. This accepts synchronously.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from recess.errors import GuestFailed

LINE_BYTES = 16 << 20
BACKLOG = 16


class SocketStream:
    """A `ByteStream` over a socket: a broken connection is GuestFailed, as a cut link is."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, limit: int = 65536) -> bytes:
        """Return some bytes, b"" at the end."""
        try:
            return await self._reader.read(limit)
        except OSError as exc:
            raise GuestFailed(f"the connection broke: {exc}") from exc

    async def write(self, data: bytes) -> None:
        """Send all, waiting while the other side is slow."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as exc:
            raise GuestFailed(f"the connection broke: {exc}") from exc

    async def close_write(self) -> None:
        """Half-close."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            with contextlib.suppress(OSError):
                self._writer.write_eof()

    async def close(self) -> None:
        """Close both ways; may be called twice."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def dial_here(port: int | str, host: str) -> SocketStream:
    """Connect to a port of this host, or to the Unix socket at a path. Raises OSError."""
    if isinstance(port, str):
        return SocketStream(*await asyncio.open_unix_connection(port))
    return SocketStream(*await asyncio.open_connection(host, port))


class Door:
    """Opens at once. `talk(stream)` runs as a task for each connection; the stream is closed when it ends."""

    def __init__(self, path: Path, talk: Callable[[SocketStream], Awaitable[None]]) -> None:
        path.unlink(missing_ok=True)
        self._talk = talk
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(BACKLOG)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._knock)

    def close(self) -> None:
        """Let nobody in any more; who is in stays. May be called twice."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    async def empty(self) -> None:
        """Close, and end those who are in."""
        self.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _knock(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return  # it went away again
        task = asyncio.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: connection.close())  # also of one that was ended before it began

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LINE_BYTES)
        stream = SocketStream(reader, writer)
        try:
            await self._talk(stream)
        finally:
            await stream.close()
