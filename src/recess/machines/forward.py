"""Published ports: a listener on the host, a connection through the guest link for each client. No NIC is needed.

The link is asked for anew for every connection, so a forwarder outlives pause, resume and re-adoption of its machine.
It must know nothing of machine states; what cannot be reached is a closed connection, as with any dead server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from recess.errors import Conflict, InvalidSpec, RecessError, Unavailable
from recess.guestlink.link import ByteStream, GuestLink
from recess.machines.parts import UNDO
from recess.machines.service import Port

CONNECTIONS_MAX = 256  # per machine; more wait in the listener's backlog
_PIECE = 65536

LinkOf = Callable[[], Awaitable[GuestLink]]


class Forwarder:
    """The published ports of one machine."""

    def __init__(self, link_of: LinkOf) -> None:
        self._link_of = link_of
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []  # of Unix sockets that are ours
        self._open: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self.ports: list[Port] = []

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    async def start(self, ports: Sequence[Port], *, fall_back: bool = False) -> list[Port]:
        """Listen; returns the ports as they are (0 replaced by the port that was found).

        With `fall_back` a host port that is taken is replaced by a free one (a machine coming back must not fail
        for it); without, it raises Conflict and nothing is left open.
        """
        try:
            for ip, host_port, guest_port in ports:
                self.ports.append(await self._listen(ip, host_port, guest_port, fall_back))
        except UNDO:
            await self.stop()
            raise
        return list(self.ports)

    async def _listen(self, ip: str, host_port: int, guest_port: int | str, fall_back: bool) -> Port:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                self._open.add(task)
                task.add_done_callback(self._open.discard)
            await self._serve(reader, writer, guest_port)

        if ip.startswith("/"):
            self._servers.append(await asyncio.start_unix_server(serve, sock=_socket_at(ip), limit=_PIECE))
            self._paths.append(ip)
            return ip, 0, guest_port
        try:
            server = await asyncio.start_server(serve, ip, host_port, limit=_PIECE)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE and fall_back:
                return await self._listen(ip, 0, guest_port, False)
            if exc.errno == errno.EADDRINUSE:
                raise Conflict(f"port {ip}:{host_port} is in use on this host", hint="publish another port") from exc
            raise InvalidSpec(f"cannot listen on {ip}:{host_port}: {exc.strerror or exc}") from exc
        self._servers.append(server)
        return ip, int(server.sockets[0].getsockname()[1]), guest_port

    async def open(self, guest_port: int | str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection to a port of the machine that counts like a client's. Raises Unavailable (nobody listens
        there, too many connections), and what reaching the machine raises."""
        if self._room.locked():
            raise Unavailable(f"{CONNECTIONS_MAX} connections to this machine are open")
        near, far = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=near, limit=_PIECE)
        dialled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._serve(reader, writer, guest_port, dialled))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        task.add_done_callback(lambda _task: writer.close())  # also of a task that was cancelled before it began
        task.add_done_callback(lambda _task: dialled.cancel())
        try:
            await dialled
            return await asyncio.open_connection(sock=far, limit=_PIECE)
        except UNDO as exc:
            task.cancel()
            far.close()
            me = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and me is not None and not me.cancelling():
                raise Unavailable("the machine went away") from exc  # `stop`, not our caller
            raise

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, guest_port: int | str,
        dialled: asyncio.Future[None] | None = None,
    ) -> None:  # fmt: skip
        """Carry one connection to its end; `dialled` is told whether it came about."""
        async with self._room:
            stream: ByteStream | None = None
            try:
                stream = await (await self._link_of()).dial(guest_port)
                if dialled is not None and not dialled.done():
                    dialled.set_result(None)
                await _both_ways(reader, writer, stream)
            except (RecessError, OSError) as exc:  # to the client this is a server that hung up
                if dialled is not None and not dialled.done():
                    dialled.set_exception(exc)
            finally:
                if stream is not None:
                    with contextlib.suppress(RecessError):
                        await stream.close()
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def stop(self) -> None:
        """Close listeners and connections; may be called twice."""
        for server in self._servers:
            server.close()
        for path in self._paths:
            _forget(path)
        self._paths.clear()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        self._servers.clear()
        self.ports.clear()


def _socket_at(path: str) -> socket.socket:
    """Return a bound Unix socket, its owner's alone. One that a server left behind which is no more is replaced.

    Raises Conflict (somebody serves there, or it is something else), InvalidSpec (no such folder, no right to it).
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise Conflict(f"{path} is there and is no socket", hint="publish at another path")
            if _is_served(path):
                raise Conflict(f"somebody serves at {path}", hint="publish at another path")
            Path(path).unlink()
        sock.bind(path)
        Path(path).chmod(0o600)  # before it listens: nobody else has come in
    except OSError as exc:
        sock.close()
        raise InvalidSpec(f"cannot listen at {path}: {exc.strerror or exc}") from exc
    except UNDO:
        sock.close()
        raise
    return sock


def _forget(path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    return code in (0, errno.EAGAIN, errno.EACCES)  # a full backlog, another user's: it lives


async def _both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: ByteStream) -> None:
    async def inward() -> None:
        while data := await reader.read(_PIECE):
            await stream.write(data)
        await stream.close_write()

    async def outward() -> None:
        while data := await stream.read(_PIECE):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    tasks = [asyncio.create_task(inward()), asyncio.create_task(outward())]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
