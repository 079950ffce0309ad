"""The host's end of the guest channel: listen, let QEMU connect, speak to guestd, fall silent during a capture.

The host listens and QEMU connects (and connects again when the server was replaced), so a connection is a signal and
nobody polls. The newest connection is the link; an older one is closed.

Silence. A stopped VM's memory is copied and its device state saved one after the other, and QEMU moves bytes between
the socket and the guest's queues even while the vCPUs stand still. A byte moved between the two would leave them in
disagreement. So before the stop nothing more is sent and everything sent must have arrived, and until the capture is
through nothing is read either (a read makes room, and room makes QEMU move the guest's output).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable
from typing import Any

from recess.drivers.kept.layout import LINK_SOCKET, Layout, socket_address
from recess.errors import DriverFailed, RecessError
from recess.guestlink.client import Link, connect
from recess.guestlink.link import WakeUp

_QUIET_TIMEOUT_S = 0.5
_QUIET_STEP_S = 0.001


class GatedTransport(asyncio.Transport):
    """A transport that can be told to hold back what is written and to read nothing; else it is the one below."""

    def __init__(self, below: asyncio.Transport, sock: socket.socket) -> None:
        super().__init__()
        self._below = below
        self._sock = sock
        self._held: bytearray | None = None

    def hold(self) -> None:
        """Keep writes here and read no more."""
        if self._held is None:
            self._held = bytearray()
            with contextlib.suppress(RuntimeError):
                self._below.pause_reading()

    def release(self) -> None:
        """Send what was kept and read again."""
        held, self._held = self._held, None
        if held is not None and not self._below.is_closing():
            self._below.write(held)
            with contextlib.suppress(RuntimeError):
                self._below.resume_reading()

    def delivered(self) -> bool:
        """Tell whether QEMU has taken everything that was sent."""
        if self._below.is_closing():
            return True
        (queued,) = struct.unpack("i", fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))
        return queued == 0 and self._below.get_write_buffer_size() == 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or keep while held (what may be under way is bounded by the protocol's credit)."""
        if self._held is None:
            self._below.write(data)
        else:
            self._held += data

    def get_write_buffer_size(self) -> int:
        """Return the bytes not yet given to the kernel, held ones included."""
        return self._below.get_write_buffer_size() + len(self._held or b"")

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Pass the limits on."""
        self._below.set_write_buffer_limits(high, low)

    def close(self) -> None:
        """Close."""
        self._below.close()

    def abort(self) -> None:
        """Close without sending what is left."""
        self._below.abort()

    def is_closing(self) -> bool:
        """Tell whether it is closed or about to be."""
        return self._below.is_closing()

    def can_write_eof(self) -> bool:
        """There is no half-closing here."""
        return False

    def pause_reading(self) -> None:
        """Stop reading."""
        self._below.pause_reading()

    def resume_reading(self) -> None:
        """Read again, unless held."""
        if self._held is None:
            self._below.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the transport below says."""
        return self._below.get_extra_info(name, default)


class LinkPort:
    """A listening socket in the run folder. To be made before the VM starts, or again after a restart."""

    def __init__(self, sock: socket.socket, hello_timeout_s: float) -> None:
        self._sock = sock
        self._hello_timeout_s = hello_timeout_s
        self._loop = asyncio.get_running_loop()
        self._gate: GatedTransport | None = None
        self._link: Link | None = None
        self._connected = asyncio.Event()
        self._failure: RecessError | None = None
        self._serving: asyncio.Task[None] | None = None
        self._wake: WakeUp | None = None

    @classmethod
    def open(cls, layout: Layout, *, hello_timeout_s: float) -> LinkPort:
        """Listen, so that QEMU can connect. A socket that an earlier server left is replaced."""
        (layout.run / LINK_SOCKET).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with socket_address(layout.run, LINK_SOCKET) as address:
                sock.bind(address)
            sock.listen(4)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return cls(sock, hello_timeout_s)

    def start(self, wake: WakeUp | None = None) -> None:
        """Speak to guestd from now on: it runs, or is about to. May be called again. `wake` goes with the first hello."""
        if self._serving is None:
            self._wake = wake
            self._serving = self._loop.create_task(self._serve())

    @property
    def link(self) -> Link:
        """The link. Raises DriverFailed before guestd has said hello."""
        if self._link is None:
            raise DriverFailed("guestd has not connected")
        return self._link

    async def wait_connected(self) -> Link:
        """Return the link once guestd has said hello; raises what the attempt raised (GuestFailed, Timeout)."""
        await self._connected.wait()
        if self._failure is not None:
            raise self._failure
        return self.link

    @contextlib.asynccontextmanager
    async def silence(self) -> AsyncIterator[Callable[[], None]]:
        """Hold the channel inside the block; yields a function that ends the silence early.

        Waits (bounded) until QEMU has taken what was sent. A guest that does not take its input for that long harms
        its own snapshot only.
        """
        gate = self._gate
        if gate is None:
            yield lambda: None
            return
        gate.hold()
        try:
            end = self._loop.time() + _QUIET_TIMEOUT_S
            while not gate.delivered() and self._loop.time() < end:  # noqa: ASYNC110  "the peer has read" is no event
                await asyncio.sleep(_QUIET_STEP_S)
            yield gate.release
        finally:
            gate.release()

    async def _serve(self) -> None:
        greeting: asyncio.Task[None] | None = None
        try:
            while True:
                sock, _ = await self._loop.sock_accept(self._sock)
                if greeting is not None:
                    await _cancel(greeting)
                greeting = self._loop.create_task(self._greet(sock))
        finally:
            if greeting is not None:
                await _cancel(greeting)

    async def _greet(self, sock: socket.socket) -> None:
        old, self._link = self._link, None
        if old is not None:
            await old.close()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, sock)
        gate = self._gate = GatedTransport(transport, sock)
        writer = asyncio.StreamWriter(gate, protocol, reader, self._loop)
        wake, self._wake = self._wake, None
        try:
            self._link = await connect(reader, writer, hello_timeout_s=self._hello_timeout_s, wake=wake)
            self._failure = None
        except RecessError as exc:
            self._failure = exc
            writer.close()
        except asyncio.CancelledError:
            writer.close()
            raise
        self._connected.set()

    async def close(self) -> None:
        """Stop listening and cut the link. May be called twice."""
        if self._serving is not None:
            await _cancel(self._serving)
        self._sock.close()
        link, self._link = self._link, None
        if link is not None:
            await link.close()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
