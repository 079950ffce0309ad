"""Streams of one link: bytes with credit both ways (`Stream`) and a process's streams (`JobHandle`).

A stream buffers at most WINDOW bytes that nobody has read: the guest may not send more without credit, and one that
does is cut off. Credit comes back as bytes are read. This module must know nothing of requests and replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from recess.errors import BadInput, GuestFailed, RecessError, Timeout
from recess.guestlink.frames import MAX_PAYLOAD, WINDOW, Kind

_LINGER = 1  # on RESET: deliver first what was sent before
_KEPT_BYTES = 1024 * 1024  # output kept for a later reader while somebody only waits for the end
_KEPT_PIECES = 32 * 1024  # of them at most: a piece costs more than its bytes
_PIECE_BYTES = 4096
_CHANNELS = (1, 2)


class Wire(Protocol):
    """What a stream needs of its link."""

    def send(self, kind: Kind, flags: int, stream: int, payload: bytes | memoryview = b"") -> None:
        """Queue a frame. Raises GuestFailed when the link has failed."""
        ...

    async def drain(self) -> None:
        """Wait until the transport takes more."""
        ...

    def forget_stream(self, stream: int, outstanding: int) -> None:
        """The stream is over here; the guest may still send this many bytes that were on their way."""
        ...


class Stream:
    """One two-way byte stream (the `ByteStream` of `recess.guestlink.link`)."""

    def __init__(self, wire: Wire, number: int, window: int = WINDOW) -> None:
        self.number = number
        self._wire = wire
        self._window = window  # the most the guest may let us send ahead
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._granted = WINDOW  # what the guest may still send
        self._owed = 0  # read here, not yet granted again
        self._credit = WINDOW  # what we may still send
        self._ended = False
        self._failure: RecessError | None = None
        self._closed = False
        self._eof_sent = False
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()

    # ---- called by the link

    def on_data(self, channel: int, payload: bytes) -> None:
        """Bytes came. Raises GuestFailed when they exceed the credit or follow the end."""
        if len(payload) > self._granted or self._ended:
            raise GuestFailed(f"the guest sent {len(payload)} bytes beyond its credit on stream {self.number}")
        self._granted -= len(payload)
        if payload:
            self._inbox.append((channel, payload))
            self._wake.set()

    def on_credit(self, payload: bytes) -> None:
        """The guest took bytes. Raises GuestFailed for credit that was never used."""
        amount = struct.unpack("<I", payload)[0] if len(payload) == 4 else 0
        if amount == 0 or self._credit + amount > self._window:
            raise GuestFailed(f"the guest granted impossible credit on stream {self.number}")
        self._credit += amount
        self._wake.set()

    def on_eof(self) -> None:
        """The guest will send no more."""
        self._ended = True
        self._wake.set()
        self._settle()

    def fail(self, error: RecessError) -> None:
        """The stream was reset or the link is gone."""
        if self._failure is None:
            self._failure = error
        self._wake.set()

    # ---- called by users

    async def read(self, limit: int = 65536) -> bytes:
        """Return some bytes, b"" at the end. Raises GuestFailed when the stream was cut."""
        item = await self._next(limit)
        return b"" if item is None else item[1]

    async def write(self, data: bytes, *, stall_s: float | None = None) -> None:
        """Send all, waiting for credit; `stall_s` bounds each wait (Timeout)."""
        async with self._turn:
            view = memoryview(data)
            while view:
                await self._until(lambda: self._credit > 0, stall_s)
                if self._failure is not None:
                    raise self._failure
                if self._closed or self._eof_sent:
                    raise BadInput("the stream is closed for writing")
                n = min(len(view), self._credit, MAX_PAYLOAD)
                self._credit -= n
                self._wire.send(Kind.DATA, 0, self.number, view[:n])
                view = view[n:]
                await self._wire.drain()

    async def close_write(self) -> None:
        """Half-close. A second call does nothing."""
        async with self._turn:
            if self._eof_sent or self._closed or self._failure is not None:
                return
            self._eof_sent = True
            self._wire.send(Kind.EOF, 0, self.number)
            self._settle()
            await self._wire.drain()

    async def close(self) -> None:
        """Close both ways: what was written still reaches its reader, what is unread is dropped. May be called twice."""
        self._drop(_LINGER)

    def abort(self) -> None:
        """End both ways at once; what the guest has not delivered yet is lost."""
        self._drop(0)

    def _drop(self, flags: int) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.clear()
        self._wake.set()
        if self._failure is None and not self._over():
            with contextlib.suppress(GuestFailed):  # the link is gone, and the stream with it
                self._wire.send(Kind.RESET, flags, self.number)
        self._wire.forget_stream(self.number, self._granted)

    # ---- inside

    def _over(self) -> bool:
        return self._ended and self._eof_sent

    def _settle(self) -> None:
        """Once both directions have ended the guest has forgotten the stream, so must the link."""
        if self._over():
            self._wire.forget_stream(self.number, 0)

    async def _until(self, ready: Callable[[], bool], stall_s: float | None = None) -> None:
        while not ready():
            if self._failure is not None:
                raise self._failure
            if self._closed:
                return
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), stall_s)
            except TimeoutError:
                raise Timeout(f"the guest did not move stream {self.number} for {stall_s:g} s") from None

    async def _next(self, limit: int, stall_s: float | None = None) -> tuple[int, bytes] | None:
        """Return the next piece of one channel, None at the end."""
        await self._until(lambda: bool(self._inbox) or self._ended, stall_s)
        if not self._inbox:
            return None
        channel, data = self._inbox[0]
        if len(data) > limit:
            self._inbox[0] = (channel, data[limit:])
            data = data[:limit]
        else:
            self._inbox.popleft()
        self._consumed(len(data))
        return channel, data

    def _consumed(self, count: int) -> None:
        self._owed += count
        if self._owed < WINDOW // 4 or self._ended or self._closed or self._failure is not None:
            return
        amount, self._owed = self._owed, 0
        self._granted += amount
        self._wire.send(Kind.CREDIT, 0, self.number, struct.pack("<I", amount))

    async def read_all(self, limit: int, stall_s: float) -> bytes:
        """Return everything up to the end. Raises GuestFailed over the limit, Timeout when nothing moves."""
        parts: list[bytes] = []
        size = 0
        while (item := await self._next(1 << 20, stall_s)) is not None:
            size += len(item[1])
            if size > limit:
                raise GuestFailed(f"the guest sent more than {limit} bytes")
            parts.append(item[1])
        return b"".join(parts)


Request = Callable[[Mapping[str, Any]], Awaitable[Any]]


class JobHandle(Stream):
    """A process in the guest with its streams (the `Job` of `recess.guestlink.link`)."""

    def __init__(self, wire: Wire, number: int, request: Request) -> None:
        super().__init__(wire, number)
        self.job_id = ""
        self.pid = 0
        self._request = request
        self._exit_code: int | None = None
        self._reading = False
        self._waiters = 0
        self._unread = 0
        self._prepaid = 0  # unread bytes for which the guest has new credit already

    def started(self, job_id: str, pid: int) -> None:
        """The guest has answered the exec or attach request."""
        self.job_id, self.pid = job_id, pid

    def on_exit(self, exit_code: int) -> None:
        """The process has ended and all its output was sent."""
        if not 0 <= exit_code <= 255:
            raise GuestFailed(f"the guest sent an impossible exit code: {exit_code}")
        self._exit_code = exit_code
        self._ended = True
        self._wake.set()
        self._wire.forget_stream(self.number, 0)

    def on_data(self, channel: int, payload: bytes) -> None:
        """Output came (an empty frame: a gap); while somebody only waits, keep the newest and go on."""
        if payload and channel not in _CHANNELS:
            raise GuestFailed(f"the guest sent output on a channel that does not exist: {channel}")
        super().on_data(channel, payload)
        self._unread += len(payload)
        if not payload and (not self._inbox or self._inbox[-1][1]):
            self._inbox.append((0, b""))
            self._wake.set()
        if self._waiters and not self._reading:
            self._merge_last()
            self._absorb()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (1 or 2, bytes); (0, b"") tells of a gap. One reader at a time."""
        if self._reading:
            raise BadInput("the job's output is being read already")
        self._reading = True
        try:
            while (item := await self._next(1 << 20)) is not None:
                yield item
        finally:
            self._reading = False

    async def close_stdin(self) -> None:
        """Send end of file."""
        await self.close_write()

    async def signal(self, number: int) -> None:
        """Send a signal to the process group; IllegalState when it has ended."""
        await self._request({"op": "signal", "job_id": self.job_id, "signal": number})

    async def resize(self, rows: int, cols: int) -> None:
        """Tell a pty its size."""
        await self._request({"op": "resize", "job_id": self.job_id, "rows": rows, "cols": cols})

    async def wait(self) -> int:
        """Return the exit code. Without a reader of `output` the newest 1 MiB of it is kept for a later one."""
        self._waiters += 1
        if not self._reading:
            self._absorb()
        try:
            await self._until(lambda: self._exit_code is not None)
        finally:
            self._waiters -= 1
        if self._exit_code is None:
            raise GuestFailed(f"detached from job {self.job_id} before its end")
        return self._exit_code

    async def detach(self) -> None:
        """Drop the streams; the process goes on, its output stays in the guest's ring."""
        self._drop(0)

    async def close(self) -> None:
        """The same as `detach`."""
        self._drop(0)

    def _over(self) -> bool:
        """A job's stream ends with its exit, not with stdin's end of file."""
        return self._exit_code is not None

    def _consumed(self, count: int) -> None:
        """What was granted while nobody read is not granted again when it is read."""
        self._unread -= count
        paid = min(count, self._prepaid)
        self._prepaid -= paid
        super()._consumed(count - paid)

    def _merge_last(self) -> None:
        """Join small pieces of one channel: many tiny frames must not cost more than their bytes."""
        if len(self._inbox) < 2:
            return
        (channel, data), (before, earlier) = self._inbox[-1], self._inbox[-2]
        if channel == before and earlier and len(earlier) + len(data) <= _PIECE_BYTES:
            self._inbox.pop()
            self._inbox[-1] = (channel, earlier + data)

    def _absorb(self) -> None:
        """Grant credit for what waits unread, dropping the oldest beyond the cap, with a mark where it was."""
        super()._consumed(self._unread - self._prepaid)
        gap = False
        while self._unread > _KEPT_BYTES or len(self._inbox) > _KEPT_PIECES:
            self._unread -= len(self._inbox.popleft()[1])
            gap = True
        self._prepaid = self._unread
        if gap:
            self._inbox.appendleft((0, b""))
