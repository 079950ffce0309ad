"""A small asyncio client of QEMU's monitor protocol (QMP): commands with descriptors, events, bounds, timeouts.

Own and not the `qemu.qmp` package, see docs/decisions/qmp-client.md. It knows the protocol (QEMU's
docs/interop/qmp-spec.rst) and nothing of machines. One reader task; commands may overlap and are answered by id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from recess.drivers.kept.layout import MONITOR_SOCKET, socket_address
from recess.drivers.kept.steps import RefusedAlive
from recess.errors import DriverFailed, Timeout

LINE_LIMIT = 4 << 20
"""Bytes; a monitor that sends a longer line is broken."""

EventFilter = Callable[[Mapping[str, Any]], bool]


class QmpRefused(RefusedAlive):
    """QEMU answered a command with an error; `details`: command, error_class, description."""

    def __init__(self, command: str, error: Mapping[str, Any]) -> None:
        description = str(error.get("desc", "no description"))
        super().__init__(
            f"QEMU refused {command}: {description}",
            command=command,
            error_class=str(error.get("class", "")),
            description=description,
        )


class Qmp:
    """One monitor connection. `lost` is done when it is gone, for whatever reason."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._expected: list[tuple[str, EventFilter, asyncio.Future[Mapping[str, Any]]]] = []
        self._greeting: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        self._sending = asyncio.Lock()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._reader = self._loop.create_task(self._read())

    @classmethod
    async def connect(cls, run: Any, *, timeout_s: float) -> Qmp:
        """Connect to the monitor of the VM with this run folder and leave the negotiation behind.

        Raises DriverFailed if nobody listens or the VM goes, Timeout.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            with socket_address(run, MONITOR_SOCKET) as address:
                sock.connect(address)
        except OSError as exc:
            sock.close()
            raise DriverFailed(f"the VM's monitor cannot be reached: {exc.strerror}") from exc
        client = cls(sock)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(client._greeting)
                await client.execute("qmp_capabilities", timeout_s=timeout_s)
        except BaseException as exc:
            await client.close()
            if isinstance(exc, TimeoutError):
                raise Timeout(f"the VM's monitor said nothing for {timeout_s:g} s") from exc
            raise
        return client

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fd: int | None = None,
        timeout_s: float = 10.0,
    ) -> Any:
        """Run one command and return its result; `fd` goes with it as a descriptor (for `getfd`, `add-fd`).

        Raises QmpRefused, DriverFailed when the connection is lost, Timeout (the command may still take effect).
        """
        if self.lost.done():
            raise DriverFailed(f"the VM's monitor is gone, cannot {command}")
        number = next(self._ids)
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._pending[number] = (command, answer)
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(json.dumps(message).encode() + b"\n", fd)
                return await answer
        except TimeoutError as exc:
            raise Timeout(f"QEMU did not answer {command} within {timeout_s:g} s") from exc
        finally:
            self._pending.pop(number, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # an answer that came too late is of no interest

    def expect(self, event: str, match: EventFilter = lambda _data: True) -> asyncio.Future[Mapping[str, Any]]:
        """Return a future of the next such event's data; ask before the command that causes it.

        It fails with DriverFailed when the connection is lost. Cancel it if it is not needed any more.
        """
        future: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        if self.lost.done():
            future.set_exception(DriverFailed(f"the VM's monitor is gone, no {event} will come"))
        else:
            self._expected.append((event, match, future))
        return future

    async def close(self) -> None:
        """Drop the connection; the VM is not touched. May be called twice."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._fail("closed")
        self._sock.close()

    async def _send(self, line: bytes, fd: int | None) -> None:
        async with self._sending:
            try:
                if fd is not None:
                    # Lines are short and few are under way, so the socket has room; else QEMU reads no more.
                    sent = socket.send_fds(self._sock, [line], [fd])
                    line = line[sent:]
                await self._loop.sock_sendall(self._sock, line)
            except OSError as exc:
                raise DriverFailed(f"the VM's monitor takes no commands: {exc.strerror}") from exc

    async def _read(self) -> None:
        buffer = bytearray()
        try:
            while True:
                data = await self._loop.sock_recv(self._sock, 65536)
                if not data:
                    return self._fail("QEMU closed it")
                buffer += data
                *lines, rest = bytes(buffer).split(b"\n")
                buffer = bytearray(rest)
                if len(buffer) > LINE_LIMIT:
                    return self._fail("a line was too long")
                for line in lines:
                    if line.strip():
                        self._take(json.loads(line))
        except (OSError, ValueError) as exc:
            self._fail(str(exc))

    def _take(self, message: Any) -> None:
        if not isinstance(message, dict):
            return
        if "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(message["QMP"])
        elif "event" in message:
            self._take_event(str(message["event"]), message.get("data") or {})
        else:
            command, answer = self._pending.get(message.get("id", 0), ("", None))
            if answer is None or answer.done():
                return
            if "error" in message:
                answer.set_exception(QmpRefused(command, message["error"]))
            else:
                answer.set_result(message.get("return"))

    def _take_event(self, name: str, data: Mapping[str, Any]) -> None:
        for entry in list(self._expected):
            event, match, future = entry
            if future.done():
                self._expected.remove(entry)
            elif event == name and match(data):
                self._expected.remove(entry)
                future.set_result(data)

    def _fail(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        waiting: list[asyncio.Future[Any]] = [answer for _command, answer in self._pending.values()]
        waiting += [future for _event, _match, future in self._expected]
        waiting.append(self._greeting)
        self._expected.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(DriverFailed(f"the VM's monitor connection was lost: {why}"))
                future.exception()  # whoever still waits sees it; nobody else need
