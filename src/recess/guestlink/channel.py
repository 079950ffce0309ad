"""One connected byte channel to guestd: frames out, frames in, requests, pings, streams both ways.

The guest is hostile: buffers are bounded by credit, bodies by MAX_BODY, replies are matched to requests, a lie about
any of it fails the whole channel with GuestFailed. Silence ends in Timeout. One task reads; it never waits for a user.
This module must know nothing of what requests mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import msgspec

from recess.errors import BadInput, GuestFailed, RecessError, Timeout
from recess.guestlink import wire
from recess.guestlink.flows import JobHandle, Stream
from recess.guestlink.frames import FLAG_MORE, MAX_BODY, MAX_PAYLOAD, WINDOW, Decoder, Frame, Garbage, Kind, encode
from recess.guestlink.link import IncomingHandler

REQUEST_TIMEOUT_S = 30.0
MAX_INCOMING = 256  # streams the guest may have open at once; guestd itself stops at 128
_UNSENT_BYTES_MAX = 4 << 20  # frames the guest does not take, beyond which it is given up
_STRAY_FRAME_BYTES = 64  # what a frame for a stream that is over counts, beyond its payload
_STRAY_FRAMES = 64


class Channel:
    """Frames in and out of one connected byte channel, matched to requests and streams."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: Decoder,
        hello: wire.Hello,
        rest: list[Frame],
    ) -> None:
        self.hello = hello
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._failure: RecessError | None = None
        self._gone = asyncio.Event()
        self._requests: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._abandoned: set[int] = set()
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count(1)
        self._odd = itertools.count(1, 2)
        self._streams: dict[int, Stream] = {}
        self._partial: tuple[int, bytearray] | None = None
        self._stray_bytes = 0  # what the guest may still send for streams that are over
        self._handler: IncomingHandler | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._run = asyncio.create_task(self._read_loop(rest))

    # ---- life

    @property
    def failure(self) -> RecessError | None:
        """Why the link is of no more use, None while it is."""
        return self._failure

    async def wait_closed(self) -> str:
        """Return, when the link is gone, why in one line."""
        await self._gone.wait()
        return self._failure.message if self._failure is not None else "closed"

    async def close(self) -> None:
        """Cut the channel from the host side. May be called twice."""
        self._fail(GuestFailed("the guest link was closed"))
        self._run.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._run, *self._tasks, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _fail(self, error: RecessError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        waiting: list[asyncio.Future[Any]] = [*self._requests.values(), *self._pings.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: a caller that was cancelled meanwhile will not ask
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()  # a guest that does not read would hold a polite close for ever
        self._writer.close()
        self._gone.set()

    # ---- frames out

    def send(self, kind: Kind, flags: int, stream: int, payload: bytes | memoryview = b"") -> None:
        """Queue a frame. Raises the link's failure, or fails it when the guest takes nothing any more."""
        if self._failure is not None:
            raise self._failure
        if self._writer.transport.get_write_buffer_size() > _UNSENT_BYTES_MAX:
            self._fail(GuestFailed("the guest does not read its channel"))
            return
        self._writer.write(encode(kind, flags, stream, payload))

    async def drain(self) -> None:
        """Wait until the transport takes more."""
        try:
            await self._writer.drain()
        except OSError as exc:
            self._fail(GuestFailed(f"the guest channel was cut: {exc}"))
        if self._failure is not None:
            raise self._failure

    def forget_stream(self, stream: int, outstanding: int) -> None:
        """A stream is over; the guest may still send what its credit allowed."""
        if self._streams.pop(stream, None) is not None:
            self._stray_bytes += outstanding + _STRAY_FRAMES * _STRAY_FRAME_BYTES

    # ---- frames in

    async def _read_loop(self, rest: list[Frame]) -> None:
        try:
            for frame in rest:
                self._on_frame(frame)
            while data := await self._reader.read(65536):
                self._decoder.feed(data)
                while (item := self._decoder.next()) is not None:
                    if isinstance(item, Garbage):
                        raise GuestFailed("the guest sent bytes that are no frame")
                    self._on_frame(item)
            raise GuestFailed("the guest channel was cut")
        except RecessError as exc:
            self._fail(exc)
        except OSError as exc:
            self._fail(GuestFailed(f"the guest channel was cut: {exc}"))
        finally:
            self._fail(GuestFailed("the guest link was closed"))  # whatever ended the reader, nobody waits for ever

    def _on_frame(self, frame: Frame) -> None:
        """Handle one frame. Raises GuestFailed, which ends the link."""
        if frame.kind == Kind.REPLY:
            self._on_reply(frame)
        elif frame.kind == Kind.OPEN:
            self._on_open(frame)
        elif frame.kind == Kind.PONG:
            pinged = self._pings.pop(frame.stream, None)
            if pinged is None:
                raise GuestFailed("the guest answered a ping that was not sent")
            if not pinged.done():
                pinged.set_result(None)
        elif frame.kind == Kind.HELLO:
            self._stray(frame)  # the answer to a repeated hello
        elif frame.kind == Kind.DESYNC:
            raise GuestFailed("guestd lost the frame boundary")
        else:
            self._on_stream_frame(frame)

    def _on_stream_frame(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None:
            self._stray(frame)
        elif frame.kind == Kind.DATA:
            stream.on_data(frame.flags, frame.payload)
        elif frame.kind == Kind.CREDIT:
            stream.on_credit(frame.payload)
        elif frame.kind == Kind.EOF:
            stream.on_eof()
        elif frame.kind == Kind.RESET:
            fault = wire.decode(frame.payload, wire.Fault, "reset")
            del self._streams[frame.stream]
            self._stray_bytes += _STRAY_FRAME_BYTES
            stream.fail(GuestFailed(f"the guest cut the stream: {wire.to_error(fault).message}"))
        elif frame.kind == Kind.EXIT and isinstance(stream, JobHandle):
            stream.on_exit(wire.decode(frame.payload, wire.Exited, "exit").exit_code)
        else:
            raise GuestFailed(f"the guest sent an unexpected frame of type {frame.kind}")

    def _stray(self, frame: Frame) -> None:
        """A frame for nobody: fine as far as it was under way when its stream ended, else a flood."""
        self._stray_bytes -= len(frame.payload) + (
            0 if frame.kind == Kind.DATA and frame.payload else _STRAY_FRAME_BYTES
        )
        if self._stray_bytes < -64 * 1024:
            raise GuestFailed("the guest floods streams that do not exist")

    def _on_reply(self, frame: Frame) -> None:
        number, body = frame.stream, bytearray()
        if self._partial is not None:
            number, body = self._partial
            self._partial = None
            if number != frame.stream:
                raise GuestFailed("the guest mixed up two replies")
        body += frame.payload
        if len(body) > MAX_BODY:
            raise GuestFailed(f"the guest sent a reply longer than {MAX_BODY} bytes")
        if frame.flags & FLAG_MORE:
            self._partial = (number, body)
            return
        if number in self._abandoned:
            self._abandoned.discard(number)
            return
        future = self._requests.pop(number, None)
        if future is None:
            raise GuestFailed("the guest answered a request that was not made")
        reply = wire.decode(bytes(body), wire.Reply, "reply")
        if future.done():
            return
        if reply.error is not None:
            future.set_exception(wire.to_error(reply.error))
        elif not reply.ok:
            raise GuestFailed("the guest sent an empty reply")
        else:
            future.set_result(reply.ok)

    def _on_open(self, frame: Frame) -> None:
        number = frame.stream
        if number == 0 or number % 2 or number in self._streams:
            raise GuestFailed("the guest opened a stream under a number that is not free")
        if len(self._tasks) >= MAX_INCOMING:
            raise GuestFailed(f"the guest opened more than {MAX_INCOMING} streams")
        opened = wire.decode(frame.payload, wire.Opened, "open")
        if self._handler is None:
            self.send(Kind.RESET, 0, number)
            self._stray_bytes += MAX_PAYLOAD
            return
        stream = Stream(self, number)
        self._streams[number] = stream
        task = asyncio.create_task(self._handle(self._handler, opened, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, handler: IncomingHandler, opened: wire.Opened, stream: Stream) -> None:
        try:
            await handler(opened.service, opened.meta, stream)
        except (RecessError, OSError):
            stream.abort()  # the peer sees its connection end; the reason belonged to this stream alone
        finally:
            await stream.close()

    # ---- requests

    async def request(self, body: Mapping[str, Any], timeout_s: float | None = REQUEST_TIMEOUT_S) -> msgspec.Raw:
        """Ask guestd and return the answer's body. Raises the guest's error, typed; Timeout; GuestFailed."""
        number, future = self.ask(body)
        return await self.answer_to(number, future, body["op"], timeout_s)

    async def answer_to(
        self, number: int, future: asyncio.Future[msgspec.Raw], op: str, timeout_s: float | None
    ) -> msgspec.Raw:
        """Return the answer to a request that was queued; as `request`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.drain()
                return await asyncio.shield(future)
        except TimeoutError:
            raise Timeout(f"guestd did not answer {op!r} in {timeout_s:g} s") from None
        finally:
            self.drop_request(number)

    def expect(self, number: int) -> asyncio.Future[msgspec.Raw]:
        """Return the answer to come to what was asked before this channel was made; before anything is read from it."""
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        self._requests[number] = future
        return future

    def ask(self, body: Mapping[str, Any]) -> tuple[int, asyncio.Future[msgspec.Raw]]:
        """Queue a request; return its number and the answer to come. End it with `drop_request`."""
        try:
            data = msgspec.json.encode(body)
        except UnicodeEncodeError as exc:
            raise BadInput(f"the request {body['op']!r} holds text that is not UTF-8") from exc
        if len(data) > MAX_BODY:
            raise BadInput(f"the request {body['op']!r} is longer than {MAX_BODY} bytes")
        number = next(self._numbers)
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        pieces = [data[at : at + MAX_PAYLOAD] for at in range(0, len(data), MAX_PAYLOAD)]
        for i, piece in enumerate(pieces):
            self.send(Kind.REQUEST, FLAG_MORE if i + 1 < len(pieces) else 0, number, piece)
        self._requests[number] = future
        if self._failure is not None:
            future.set_exception(self._failure)
        return number, future

    def drop_request(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        future = self._requests.pop(number, None)
        if future is not None and not future.done():
            self._abandoned.add(number)

    def new_stream(self, window: int = WINDOW) -> Stream:
        """Return a registered stream for a request that is about to open it in the guest; `window`: how much the request
        asks to be let send ahead."""
        stream = Stream(self, next(self._odd), window)
        self._streams[stream.number] = stream
        return stream

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Return the round trip in seconds."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        begun = loop.time()
        self.send(Kind.PING, 0, number)
        self._pings[number] = future
        try:
            await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except TimeoutError:
            raise Timeout(f"guestd did not answer a ping in {timeout_s:g} s") from None
        return loop.time() - begun

    def new_job(self) -> JobHandle:
        """Return a registered stream for a job that is about to be started or attached."""
        handle = JobHandle(self, next(self._odd), self.request)
        self._streams[handle.number] = handle
        return handle

    def serve_incoming(self, handler: IncomingHandler) -> None:
        """Take streams that the guest opens. Until then its connections wait in their backlog, they do not fail."""
        self._handler = handler
        self.send(Kind.LISTEN, 1, 0)
