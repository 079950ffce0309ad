"""The connected channel to one guestd: `connect` says hello, `Link` is the `GuestLink` of `recess.guestlink.link`.

A `Link` lives as long as its byte channel. When that drops (a server restart, a restored machine) the owner connects
again and gets a new `Link`: streams of the old one fail, processes in the guest live on and are attached anew.

The guest is hostile: buffers are bounded by credit, bodies by MAX_BODY, replies are matched to requests, a lie about
any of it fails the whole link with GuestFailed. Silence ends in Timeout. One task reads; it never waits for a user.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from recess.errors import BadInput, GuestFailed, RecessError, Timeout
from recess.guestlink import wire
from recess.guestlink.flows import JobHandle, Stream
from recess.guestlink.frames import FLAG_MORE, FLAG_RETRY, MAX_BODY, MAX_PAYLOAD, PAD, Decoder, Frame, Garbage, Kind, encode
from recess.guestlink.link import ByteStream, ExecRequest, FileStat, IncomingHandler, Job, JobInfo, Thaw

REQUEST_TIMEOUT_S = 30.0
STALL_S = 30.0  # a file transfer that does not move for this long is given up
MAX_INCOMING = 256  # streams the guest may have open at once; guestd itself stops at 128
MAX_LISTED = 10_000
_HELLO_BYTES_MAX = 16 << 20  # what an old connection may have left in the channel before the hello is answered
_UNSENT_BYTES_MAX = 4 << 20  # frames the guest does not take, beyond which it is given up
_STRAY_FRAME_BYTES = 64
_LIST_BYTES_MAX = 64 << 20


async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, hello_timeout_s: float) -> Link:
    """Say hello on a fresh byte channel and return the link. Raises Timeout or GuestFailed; then close the channel.

    The hello is repeated behind padding while it stays unanswered: an earlier connection may have died in the middle
    of a frame, whose end guestd still waits for. It has a new nonce each time `connect` is called, so guestd ends
    the streams of former connections, and whatever it still sent for them is skipped here.
    """
    nonce = secrets.token_hex(16)
    decoder = Decoder()
    body = msgspec.json.encode({"proto": wire.PROTO, "nonce": nonce})
    repeat = asyncio.create_task(_say_hello(writer, body))
    try:
        async with asyncio.timeout(hello_timeout_s):
            hello, rest = await _await_hello(reader, decoder, nonce)
    except TimeoutError:
        raise Timeout(f"guestd did not say hello in {hello_timeout_s:g} s") from None
    except OSError as exc:
        raise GuestFailed(f"the guest channel was cut before the hello: {exc}") from exc
    finally:
        repeat.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await repeat
    return Link(reader, writer, decoder, hello, rest)


async def _say_hello(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(encode(Kind.HELLO, 0, 0, body))
    for pause_s in itertools.chain((0.25, 0.5, 1.0), itertools.repeat(2.0)):
        await writer.drain()
        await asyncio.sleep(pause_s)
        if writer.transport.get_write_buffer_size() == 0:
            writer.write(PAD + encode(Kind.HELLO, FLAG_RETRY, 0, body))


async def _await_hello(reader: asyncio.StreamReader, decoder: Decoder, nonce: str) -> tuple[wire.Hello, list[Frame]]:
    """Skip what is left of earlier connections; return the hello and the frames that came right behind it."""
    skipped = 0
    while data := await reader.read(65536):
        skipped += len(data)
        if skipped > _HELLO_BYTES_MAX:
            break
        decoder.feed(data)
        while (item := decoder.next()) is not None:
            if isinstance(item, Garbage) or item.kind != Kind.HELLO:
                continue
            hello = wire.decode(item.payload, wire.Hello, "hello")
            if hello.nonce != nonce:
                continue
            if hello.proto != wire.PROTO:
                raise GuestFailed(f"guestd {hello.guestd[:40]} speaks protocol {hello.proto}, not {wire.PROTO}")
            rest: list[Frame] = []
            while (more := decoder.next()) is not None:
                if isinstance(more, Frame):
                    rest.append(more)
            return hello, rest
    raise GuestFailed("the guest channel was cut before the hello" if not data else "the guest floods the channel")


class Link:
    """One connected channel. Made by `connect`; see `recess.guestlink.link.GuestLink` for the contract."""

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
        for future in (*self._requests.values(), *self._pings.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: a caller that was cancelled meanwhile will not ask
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
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
            self._stray_bytes += outstanding + 64 * _STRAY_FRAME_BYTES

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
        self._stray_bytes -= len(frame.payload) + (0 if frame.kind == Kind.DATA and frame.payload else _STRAY_FRAME_BYTES)
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

    async def _request(self, body: Mapping[str, Any], timeout_s: float | None = REQUEST_TIMEOUT_S) -> msgspec.Raw:
        number, future = self._ask(body)
        try:
            await self.drain()
            return await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except TimeoutError:
            raise Timeout(f"guestd did not answer {body['op']!r} in {timeout_s:g} s") from None
        finally:
            self._drop_request(number)

    def _ask(self, body: Mapping[str, Any]) -> tuple[int, asyncio.Future[msgspec.Raw]]:
        data = msgspec.json.encode(body)
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

    def _drop_request(self, number: int) -> None:
        future = self._requests.pop(number, None)
        if future is not None and not future.done():
            self._abandoned.add(number)

    def _new_stream(self) -> Stream:
        stream = Stream(self, next(self._odd))
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

    async def info(self) -> Mapping[str, Any]:
        """Return guestd's version, boot id, uptime_s, whether the workload is frozen, hostname, mode, freezer."""
        return wire.decode(await self._request({"op": "info"}), dict[str, Any], "info")

    async def stats(self) -> Mapping[str, Any]:
        """Return memory, load and process numbers of the guest."""
        return wire.decode(await self._request({"op": "stats"}), dict[str, int | float], "stats")

    # ---- jobs

    async def exec(self, request: ExecRequest) -> Job:
        """Start a process, streams attached. NotFound (details exit_code 127), BadInput (126), IllegalState frozen."""
        return await self._job(lambda number: wire.exec_body(request, number))

    async def attach(self, job_id: str) -> Job:
        """Attach to a job; output kept in the guest's ring comes first. Raises NotFound."""
        return await self._job(lambda number: {"op": "attach", "stream": number, "job_id": job_id})

    async def _job(self, body: Any) -> Job:
        handle = JobHandle(self, next(self._odd), self._request)
        self._streams[handle.number] = handle
        try:
            row = wire.decode(await self._request(body(handle.number)), wire.JobRow, "job")
        except BaseException:
            handle.abort()
            raise
        handle.started(row.job_id, row.pid)
        return handle

    async def jobs(self) -> list[JobInfo]:
        """Return the job table, oldest first. `argv` may be cut."""
        rows = wire.decode(await self._request({"op": "jobs"}), list[wire.JobRow], "job table")
        return [row.to_info() for row in rows]

    async def forget(self, job_id: str) -> None:
        """Drop an ended job and its ring. NotFound; IllegalState while it runs."""
        await self._request({"op": "forget", "job_id": job_id})

    # ---- freeze and thaw

    async def freeze(self, *, sync: bool = False, timeout_s: float = 2.0) -> None:
        """Freeze the workload (after `syncfs` when asked); frozen already is fine. GuestFailed or Timeout."""
        body = {"op": "freeze", "sync": sync, "timeout_ms": max(1, round(timeout_s * 1000))}
        await self._strict(body, 2 * timeout_s + 1.0)  # both steps have the bound; the answer needs a moment too

    async def thaw(self, thaw: Thaw, timeout_s: float = 10.0) -> None:
        """Reseed, set the clock and identity, run hooks, unfreeze. GuestFailed or Timeout: do not serve."""
        await self._strict(wire.thaw_body(thaw), timeout_s)

    async def unfreeze(self) -> None:
        """Only let the workload run again."""
        await self._strict({"op": "unfreeze"}, REQUEST_TIMEOUT_S)

    async def _strict(self, body: Mapping[str, Any], timeout_s: float) -> None:
        """A request whose refusal, whatever its kind, means that the guest failed."""
        try:
            await self._request(body, timeout_s)
        except RecessError as exc:
            if "guest_kind" not in exc.details:
                raise
            raise GuestFailed(f"{body['op']} failed in the guest: {exc.message}", **exc.details) from exc

    # ---- streams

    async def dial(self, port: int, host: str = "127.0.0.1") -> ByteStream:
        """Open a TCP connection inside the guest. Unavailable when nobody listens; `host` is an address."""
        stream = self._new_stream()
        try:
            await self._request({"op": "dial", "stream": stream.number, "port": port, "host": host})
        except BaseException:
            stream.abort()
            raise
        return stream

    def serve_incoming(self, handler: IncomingHandler) -> None:
        """Take streams that the guest opens. Until then its connections wait in their backlog, they do not fail."""
        self._handler = handler
        self.send(Kind.LISTEN, 1, 0)

    # ---- files

    async def stat(self, path: str) -> FileStat:
        """Return what is there (links not followed); raises NotFound."""
        return wire.decode(await self._request({"op": "stat", "path": path}), wire.StatRow, "stat").to_stat()

    async def list_dir(self, path: str) -> list[FileStat]:
        """Return at most 10,000 entries, in no order; raises NotFound."""
        data = await self._get({"op": "list", "path": path}, _LIST_BYTES_MAX)
        rows = [wire.decode(line, wire.StatRow, "listing") for line in data.splitlines()[: MAX_LISTED + 1]]
        if len(rows) > MAX_LISTED:
            raise GuestFailed(f"the guest listed more than {MAX_LISTED} entries")
        return [row.to_stat() for row in rows]

    async def read_file(self, path: str, limit: int = 64 << 20) -> bytes:
        """Return a whole file; raises NotFound, or BadInput over the limit."""
        return await self._get({"op": "read", "path": path, "limit": limit}, limit)

    async def _get(self, body: dict[str, Any], limit: int) -> bytes:
        stream = self._new_stream()
        try:
            await self._request({**body, "stream": stream.number})
            return await stream.read_all(limit, STALL_S)
        finally:
            stream.abort()

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a whole file by temp name and rename; parents are made. OutOfSpace, Refused, BadInput."""

        async def pieces() -> AsyncIterator[bytes]:
            yield data

        await self._put({"op": "write", "path": path, "mode": mode}, pieces())

    async def put_tar(self, path: str, archive: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream below `path`. BadInput for a damaged archive or one that leads out of `path`."""
        await self._put({"op": "untar", "path": path}, archive)

    async def _put(self, body: dict[str, Any], pieces: AsyncIterator[bytes]) -> None:
        """Send a stream; the request is answered when the guest has all of it, or as soon as it fails."""
        stream = self._new_stream()
        number, answer = self._ask({**body, "stream": stream.number})
        sending = asyncio.create_task(_send_all(stream, pieces))
        try:
            await asyncio.wait({sending, answer}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                await sending
                await asyncio.wait_for(asyncio.shield(answer), STALL_S)
            answer.result()
        except TimeoutError:
            raise Timeout(f"guestd did not answer {body['op']!r} in {STALL_S:g} s") from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            stream.abort()
            self._drop_request(number)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder; absent is not an error. BadInput for a folder that is not empty."""
        await self._request({"op": "remove", "path": path, "recursive": recursive}, 120.0)


async def _send_all(stream: Stream, pieces: AsyncIterator[bytes]) -> None:
    async for piece in pieces:
        await stream.write(piece, stall_s=STALL_S)
    await stream.close_write()
