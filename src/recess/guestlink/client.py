"""`connect` says hello to guestd; the `Link` it returns is the `GuestLink` of `recess.guestlink.link`.

A `Link` lives as long as its byte channel. When that drops (a server restart, a restored machine) the owner connects
again and gets a new `Link`: streams of the old one fail, processes in the guest live on and are attached anew.
This module must know nothing of frames: what guestd can do, and in which words, is its whole subject.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from recess.errors import GuestFailed, RecessError, Timeout, Unsupported
from recess.guestlink import wire
from recess.guestlink.channel import REQUEST_TIMEOUT_S, Channel
from recess.guestlink.flows import Stream
from recess.guestlink.frames import PUT_WINDOW, Decoder
from recess.guestlink.hello import greet
from recess.guestlink.link import TOKEN_PATH, ByteStream, ExecRequest, FileStat, Job, JobInfo, Thaw, WakeUp

TAKES_TOKEN = "token"
TAKES_SPARSE = "sparse"  # files with holes in an archive that is unpacked
TAKES_HELLO = "hello"  # a thaw in the hello; its answer has a number that no request of ours has
HELLO_REQUEST = 0
CLOCK_LATE_S = 0.1  # how far behind a guest's clock may wake; the same as after a pause (machines.live)
STALL_S = 30.0  # a file transfer that does not move for this long is given up
REMOVE_TIMEOUT_S = 120.0
MAX_LISTED = 10_000
_LIST_BYTES_MAX = 64 << 20
_PIECE_BYTES = 1 << 18


async def connect(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    hello_timeout_s: float,
    wake: WakeUp | None = None,
) -> Link:
    """Say hello on a fresh byte channel and return the link. Raises Timeout or GuestFailed; then close the channel.

    With `wake` the hello brings a thaw along; if guestd takes that, `wake.answer` is set: await it before anything else.
    """
    decoder, begun = Decoder(), asyncio.get_running_loop().time()
    if wake is not None and not wire.fits_in_hello(wire.thaw_body(wake.make())):
        wake = None
    first = None if wake is None else lambda: wire.thaw_body(wake.make())
    hello, rest = await greet(reader, writer, decoder, hello_timeout_s, first)
    link = Link(reader, writer, decoder, hello, rest)
    if wake is not None and TAKES_HELLO in hello.takes:
        woken = link.expect(HELLO_REQUEST)

        async def answer(timeout_s: float) -> None:
            await link.woken(woken, wake, begun, timeout_s)

        wake.answer = answer
    return link


class Link(Channel):
    """One connected guestd. Made by `connect`; see `recess.guestlink.link.GuestLink` for the contract."""

    async def info(self) -> Mapping[str, Any]:
        """Return guestd's version, boot id, uptime_s, whether the workload is frozen, hostname, mode, freezer."""
        return wire.decode(await self.request({"op": "info"}), dict[str, Any], "info")

    async def stats(self) -> Mapping[str, Any]:
        """Return memory, load and process numbers of the guest."""
        return wire.decode(await self.request({"op": "stats"}), dict[str, int | float], "stats")

    # ---- jobs

    async def exec(self, request: ExecRequest) -> Job:
        """Start a process, streams attached. NotFound (details exit_code 127), BadInput (126), IllegalState frozen."""
        return await self._job(lambda number: wire.exec_body(request, number))

    async def attach(self, job_id: str) -> Job:
        """Attach to a job; output kept in the guest's ring comes first. Raises NotFound."""
        return await self._job(lambda number: {"op": "attach", "stream": number, "job_id": job_id})

    async def _job(self, body: Callable[[int], Mapping[str, Any]]) -> Job:
        handle = self.new_job()
        try:
            row = wire.decode(await self.request(body(handle.number)), wire.JobRow, "job")
        except BaseException:
            handle.abort()
            raise
        handle.started(row.job_id, row.pid)
        return handle

    async def jobs(self) -> list[JobInfo]:
        """Return the job table, oldest first. `argv` may be cut."""
        rows = wire.decode(await self.request({"op": "jobs"}), list[wire.JobRow], "job table")
        return [row.to_info() for row in rows]

    async def forget(self, job_id: str) -> None:
        """Drop an ended job and its ring. NotFound; IllegalState while it runs."""
        await self.request({"op": "forget", "job_id": job_id})

    # ---- freeze and thaw

    async def freeze(self, *, sync: bool = False, timeout_s: float = 2.0) -> None:
        """Freeze the workload (after `syncfs` when asked); frozen already is fine. GuestFailed or Timeout."""
        body = {"op": "freeze", "sync": sync, "timeout_ms": max(1, round(timeout_s * 1000))}
        await self._strict(body, 2 * timeout_s + 1.0)  # both steps have the bound; the answer needs a moment too

    async def thaw(self, thaw: Thaw, timeout_s: float = 10.0) -> None:
        """Reseed, set the clock and identity, run hooks, unfreeze. GuestFailed or Timeout: do not serve."""
        if thaw.token and TAKES_TOKEN not in self.hello.takes:
            # The guestd of an older snapshot. Before the thaw: no workload ever reads another machine's token.
            await self.write_file(TOKEN_PATH, thaw.token.encode(), 0o444)
            thaw = replace(thaw, token="")
        await self._strict(wire.thaw_body(thaw), timeout_s)

    async def woken(self, answer: asyncio.Future[msgspec.Raw], wake: WakeUp, begun: float, timeout_s: float) -> None:
        """Await the answer to the thaw that came with the hello, `begun` by the event loop's clock. GuestFailed or Timeout: do
        not serve. The guest's clock is what the host's was when the hello was made: if that is long ago, it is set again."""
        await self._strictly("thaw", self.answer_to(HELLO_REQUEST, answer, "thaw", timeout_s))
        if asyncio.get_running_loop().time() - begun > CLOCK_LATE_S:
            await self._strict({"op": "clock", "wall_ns": wake.make().wall_ns}, timeout_s)

    async def unfreeze(self) -> None:
        """Only let the workload run again."""
        await self._strict({"op": "unfreeze"}, REQUEST_TIMEOUT_S)

    async def _strict(self, body: Mapping[str, Any], timeout_s: float) -> None:
        """A request whose refusal, whatever its kind, means that the guest failed."""
        await self._strictly(body["op"], self.request(body, timeout_s))

    @staticmethod
    async def _strictly(op: str, answer: Awaitable[object]) -> None:
        try:
            await answer
        except RecessError as exc:
            if "guest_kind" not in exc.details:
                raise
            raise GuestFailed(f"{op} failed in the guest: {exc.message}", **exc.details) from exc

    # ---- streams

    async def dial(self, port: int | str, host: str = "127.0.0.1") -> ByteStream:
        """Open a connection inside the guest: TCP to an address and port, or the Unix socket at a path. Unavailable when
        nobody listens, NotFound when no socket is there."""
        stream = self.new_stream()
        where = {"path": port} if isinstance(port, str) else {"port": port, "host": host}
        try:
            await self.request({"op": "dial", "stream": stream.number, **where})
        except BaseException:
            stream.abort()
            raise
        return stream

    async def open_door(self, path: str) -> None:
        """Listen at this path in the guest. Raises BadInput, OutOfSpace."""
        await self.request({"op": "door", "path": path})

    # ---- files

    async def stat(self, path: str) -> FileStat:
        """Return what is there (links not followed); raises NotFound."""
        return wire.decode(await self.request({"op": "stat", "path": path}), wire.StatRow, "stat").to_stat()

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
        stream = self.new_stream()
        try:
            await self.request({**body, "stream": stream.number})
            return await stream.read_all(limit, STALL_S)
        finally:
            stream.abort()

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a whole file by temp name and rename; parents are made. OutOfSpace, Refused, BadInput."""

        async def pieces() -> AsyncIterator[bytes]:
            yield data

        await self._put({"op": "write", "path": path, "mode": mode}, pieces())

    async def get_tar(
        self, path: str, *, name: str = "", follow: bool = False, sparse: bool = False, skip: Sequence[str] = ()
    ) -> AsyncGenerator[bytes, None]:
        """Yield a tar of a file or folder as it comes; see `TarReader`. GuestFailed when it breaks off."""
        stream = self.new_stream()
        try:
            body = {"op": "tar", "path": path, "name": name, "follow": follow, "sparse": sparse, "skip": list(skip)}
            await self.request({**body, "stream": stream.number})
            while data := await _moving(stream.read(_PIECE_BYTES)):
                yield data
        finally:
            stream.abort()

    async def put_tar(self, path: str, archive: AsyncIterator[bytes], *, sparse: bool = False) -> None:
        """Unpack a tar stream below `path`. BadInput for a damaged archive or one that leads out of `path`."""
        if sparse and TAKES_SPARSE not in self.hello.takes:
            raise Unsupported("this machine's guestd is of before files with holes", hint="send them whole")
        await self._put({"op": "untar", "path": path}, archive)

    async def seal(self, path: str) -> str:
        """Make a place read-only for the workload; see `Sealer`. Raises NotFound, Unsupported."""
        return wire.decode(await self.request({"op": "seal", "path": path}), wire.Sealed, "seal").behind

    async def unseal(self, path: str) -> None:
        """Undo it, for a file."""
        await self.request({"op": "seal", "path": path, "open": True})

    async def _put(self, body: dict[str, Any], pieces: AsyncIterator[bytes]) -> None:
        """Send a stream; the request is answered when the guest has all of it, or as soon as it fails."""
        stream = self.new_stream(PUT_WINDOW)
        number, answer = self.ask({**body, "stream": stream.number, "window": PUT_WINDOW})
        sending = asyncio.create_task(_send_all(stream, pieces))
        try:
            both: set[asyncio.Future[Any]] = {sending, answer}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
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
            self.drop_request(number)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder; absent is not an error. BadInput for a folder that is not empty."""
        await self.request({"op": "remove", "path": path, "recursive": recursive}, REMOVE_TIMEOUT_S)


async def _moving(read: Awaitable[bytes]) -> bytes:
    try:
        return await asyncio.wait_for(read, STALL_S)
    except TimeoutError:
        raise Timeout(f"the guest sent nothing for {STALL_S:g} s") from None


async def _send_all(stream: Stream, pieces: AsyncIterator[bytes]) -> None:
    async for piece in pieces:
        await stream.write(piece, stall_s=STALL_S)
    await stream.close_write()
