"""One stream of one agent process: handshake, catch-up, requests, pushes. It serves; the supervisor decides.

The agent's copy of the log is kept whole by one rule: before the reply to an append goes out, everything older that
this agent has not seen is pushed. It must know nothing of machines, leases or turns' rules.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from recess.contextlog.contract import ContextLog, Entry, SessionRow
from recess.errors import BadInput, GuestFailed, RecessError
from recess.guestlink.link import ByteStream
from recess.sessions.following import pieces_of
from recess.sessions.protocol import Ack, Busy, DeltaLine, Drop, Hello, Lines, Request, encode, parse, request_id

BATCH = 200
BATCH_BYTES = 1 << 20
PAGE = 1000  # entries that are read at once, while those before are sent
HELLO_S = 10.0


class Channel:
    """A greeted connection. `waiting` is the id of the agent's unanswered `next`, 0 if there is none; `waits` are its
    unanswered `wait`s by id; `busy`: it is in a model call; `cancelled` is the turn that it was told to stop."""

    def __init__(self, stream: ByteStream, hello: Hello, log: ContextLog, session: str) -> None:
        self._stream = stream
        self._log = log
        self._session = session
        self._acks: dict[int, asyncio.Event] = {}
        self._ack_number = 0
        self._write_lock = asyncio.Lock()
        self.hello = hello
        self.seen = hello.position
        self.waiting = 0
        self.waits: dict[int, Request] = {}
        self.busy = hello.busy
        self.cancelled = 0
        self.done = hello.done
        self.closed = False

    async def welcome(self, row: SessionRow) -> None:
        """Greet, send what the agent's copy of the log lacks, and open for business."""
        facts = {"session": row.id, "name": row.name, "epoch": row.epoch, "head": row.head, "version": row.code_version}
        whole = pieces_of(one for one in await self._log.deltas(self._session) if one.turn == self.hello.turn)
        streams = {str(part): [len(pieces), pieces[-1].mark] for (_, part), pieces in whole.items() if pieces}
        await self.send({"t": "welcome", **facts, "streams": streams})
        await self.catch_up()
        await self.send({"t": "ready"})

    async def catch_up(self, to: int | None = None) -> None:
        """Push every entry after what the agent has seen, up to `to` (default: the head)."""
        page: Sequence[Entry] = await self._log.tail(self._session, limit=PAGE) if self.seen == 0 else ()
        at = page[-1].position if page else self.seen
        while page or to is None or at < to:
            ahead: asyncio.Task[list[Entry]] | None = None
            if to is None or at < to:
                # A long past is read while the guest, in its own process, takes in what was read before.
                ahead = asyncio.create_task(self._log.read(self._session, after=at, to=to, limit=PAGE))
            try:
                await self._push(page)
            except BaseException:
                if ahead is not None:
                    ahead.cancel()
                    await asyncio.gather(ahead, return_exceptions=True)
                raise
            page = await ahead if ahead is not None else ()
            if not page:
                return
            at = page[-1].position

    async def _push(self, entries: Sequence[Entry]) -> None:
        batch: list[bytes] = []
        size = 0
        for entry in entries:
            batch.append(_json(entry_data(entry)))
            size += len(batch[-1])
            if len(batch) >= BATCH or size > BATCH_BYTES:
                await self._send_entries(batch)
                batch, size = [], 0
        if batch:
            await self._send_entries(batch)
        if entries:
            self.seen = max(self.seen, entries[-1].position)

    async def _send_entries(self, batch: Sequence[bytes]) -> None:
        async with self._write_lock:
            await self._stream.write(b'{"t":"entries","entries":[' + b",".join(batch) + b"]}\n")

    async def reply(self, number: int, result: Mapping[str, Any]) -> None:
        """Answer a request."""
        await self.send({"t": "ok", "id": number, "result": dict(result)})

    async def refuse(self, number: int, error: RecessError) -> None:
        """Answer a request with an error."""
        await self.send({"t": "err", "id": number, "code": error.code, "message": error.message})

    async def event(self, name: str, info: Mapping[str, Any], *, ack_s: float = 0.0) -> None:
        """Tell the agent's hook of an event, if it has one; with `ack_s`, wait that long for it to be done."""
        if name not in self.hello.hooks or self.closed:
            return
        message: dict[str, Any] = {"t": "event", "event": name, "info": dict(info)}
        done = asyncio.Event()
        if ack_s:
            self._ack_number += 1
            self._acks[self._ack_number] = done
            message["ack"] = self._ack_number
        await self.send(message)
        if ack_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), ack_s)

    async def bye(self, why: str) -> None:
        """End the process's part: it must not come back."""
        with contextlib.suppress(RecessError, OSError):
            await self.send({"t": "bye", "why": why})
        await self.close()

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; waits for the guest's credit."""
        async with self._write_lock:
            await self._stream.write(encode(message))

    async def close(self) -> None:
        """Cut the stream."""
        self.closed = True
        self.waiting = 0
        self.waits.clear()
        for event in self._acks.values():
            event.set()
        with contextlib.suppress(RecessError, OSError):
            await self._stream.close()

    def acknowledged(self, number: int) -> None:
        """Take an ack."""
        event = self._acks.pop(number, None)
        if event is not None:
            event.set()


Accept = Callable[[Hello, ByteStream], Awaitable[Channel | None]]
OnRequest = Callable[[Channel, Request], Awaitable[None]]
OnLine = Callable[[Channel, DeltaLine | Drop | Busy], Awaitable[None]]


async def serve(stream: ByteStream, accept: Accept, on_request: OnRequest, on_line: OnLine) -> None:
    """Serve one stream until it ends. A guest that breaks the protocol loses its stream, never more than that."""
    lines = Lines(stream)
    channel: Channel | None = None
    try:
        first = parse(await asyncio.wait_for(lines.next(), HELLO_S) or b"null")
        if not isinstance(first, Hello):
            raise GuestFailed("agent: the first line must be hello")
        channel = await accept(first, stream)
        while channel is not None and not channel.closed:
            line = await lines.next()
            if not line:
                return
            try:
                message = parse(line)
            except BadInput as exc:
                number = request_id(line)
                if not number:
                    return
                await channel.refuse(number, exc)
                continue
            match message:
                case Request():
                    await on_request(channel, message)
                case DeltaLine() | Drop() | Busy():
                    await on_line(channel, message)
                case Ack():
                    channel.acknowledged(message.ack)
                case Hello():
                    return
    except (RecessError, OSError, TimeoutError):
        return  # the stream is over; what the agent still wants it asks for again on the next one
    finally:
        if channel is not None:
            await channel.close()
        else:
            with contextlib.suppress(RecessError, OSError):
                await stream.close()


def _json(data: Mapping[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(data)
    except UnicodeEncodeError:
        return encode(data).rstrip()  # half of a surrogate pair, which somebody's text may hold


def entry_data(entry: Entry) -> dict[str, Any]:
    """Return an entry in the form the agent's copy of the log has it."""
    return {
        "session": entry.session,
        "position": entry.position, "kind": entry.kind, "body": dict(entry.body), "turn": entry.turn,
        "ref": entry.ref, "ts": entry.ts, **({"schema": entry.schema} if entry.schema != 1 else {}),
    }  # fmt: skip
