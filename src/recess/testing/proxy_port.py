"""A proxy port without a machine: a loopback listener that hands each connection to an `IncomingHandler`.

It stands where guestd's listener on port 3128 stands, so that the broker and an agent's loop can be run for real on
the host. The stream it hands over keeps the contract of `recess.guestlink.link.ByteStream`.
"""

from __future__ import annotations

import asyncio

from recess.guestlink.link import IncomingHandler
from recess.plain.door import SocketStream


class ProxyPort:
    """An async context manager; `port` is the loopback port it listens on."""

    def __init__(self, handler: IncomingHandler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> ProxyPort:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(SocketStream(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: SocketStream) -> None:
        try:
            await self._handler("proxy", {}, stream)
        finally:
            await stream.close()
