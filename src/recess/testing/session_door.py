"""A listening unix socket for process machines that may be closed at any moment, in the middle of a connection too.

`asyncio.start_unix_server` may not: a connection that was accepted when its server is closed is dropped without being closed
(CPython 3.11), which is a leak and, with warnings as errors, a test that fails now and then. This accepts synchronously.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from recess.testing.proxy_port import SocketStream

LINE_BYTES = 16 << 20
BACKLOG = 16


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
