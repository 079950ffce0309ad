"""One judged call carried out: request up, response down, or a raw tunnel; unbuffered, with backpressure both ways.

Nothing is decided here. A response that has begun and then fails is cut, never ended politely: a chunked body without
its last chunk tells the guest the truth. This module must know nothing of policies, gates or secrets' names.
"""

from __future__ import annotations

import asyncio
import contextlib

import h11

from recess.broker.dial import Pipe, abort
from recess.broker.placeholders import fill_path
from recess.broker.targets import Keys, Target, guest_headers, upstream_headers
from recess.broker.wire import READ_BYTES, GuestSide, UpstreamSide, response_to_guest
from recess.errors import BadInput, RecessError, Timeout, Unavailable
from recess.guestlink.link import ByteStream

SILENCE_MAX_S = 600.0  # a model may think for minutes before its first byte


async def relay_request(
    guest: GuestSide, request: h11.Request, target: Target, keys: Keys, pipe: Pipe
) -> None:  # fmt: skip
    """Send the request upstream and its response to the guest as it comes; the upstream connection ends with it.

    Raises BadInput (the guest broke its body), Unavailable or Timeout (the upstream failed), GuestFailed (link cut).
    """
    upstream = UpstreamSide(*pipe)
    upload = asyncio.create_task(_upload(guest, request, target, keys, upstream))
    try:
        await _download(guest, upstream, target)
    except (OSError, h11.RemoteProtocolError) as exc:
        if upload.done() and (fault := upload.result()) is not None:
            raise fault from exc
        raise Unavailable(f"the upstream {target.authority} broke off: {exc}") from exc
    finally:
        upload.cancel()
        abort(upstream.writer)  # before the wait: whoever is cancelled there, once more, still leaves nothing open
        await asyncio.wait({upload})


async def _upload(
    guest: GuestSide, request: h11.Request, target: Target, keys: Keys, upstream: UpstreamSide
) -> RecessError | None:  # fmt: skip
    """Send the request's head and body; return what the guest did wrong. A broken upstream is the download's to tell."""
    headers = upstream_headers(list(request.headers), target, keys)
    path = fill_path(target.path, keys.values)
    try:
        head = h11.Request(method=request.method, target=path, headers=headers)
    except h11.LocalProtocolError:  # its text would show the guest what was put in
        abort(upstream.writer)
        return BadInput("the request cannot be sent on: its head is malformed")
    try:
        await upstream.send(head)
        while True:
            event = await guest.next_event()
            if isinstance(event, h11.Data):
                await upstream.send(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await upstream.send(h11.EndOfMessage())
                return None
            else:
                raise BadInput("the request ended inside its body")
    except OSError:
        return None
    except (RecessError, h11.ProtocolError) as exc:
        abort(upstream.writer)  # wakes the download, which then raises what is returned here
        return exc if isinstance(exc, RecessError) else BadInput(f"the request's body is malformed: {exc}")


async def _download(guest: GuestSide, upstream: UpstreamSide, target: Target) -> None:
    while True:
        try:
            async with asyncio.timeout(SILENCE_MAX_S):
                event = await upstream.next_event()
        except TimeoutError:
            raise Timeout(f"the upstream {target.authority} was silent for {SILENCE_MAX_S:.0f} s") from None
        if isinstance(event, h11.Response):
            await guest.send(response_to_guest(event, guest_headers(list(event.headers))))
        elif isinstance(event, h11.Data):
            await guest.send(h11.Data(data=event.data))
        elif isinstance(event, h11.EndOfMessage):
            await guest.send(h11.EndOfMessage())
            return
        elif not isinstance(event, h11.InformationalResponse):
            raise Unavailable(f"the upstream {target.authority} closed without an answer")


async def tunnel(guest: GuestSide, pipe: Pipe) -> None:
    """Answer CONNECT with 200 and carry bytes both ways until both ends have closed or one has failed."""
    try:
        if early := await accept_connect(guest):
            pipe[1].write(early)
    except BaseException:
        abort(pipe[1])
        raise
    await carry(guest.stream, pipe)


async def carry(stream: ByteStream, pipe: Pipe) -> None:
    """Carry bytes both ways until both ends have closed or one has failed. Raises Unavailable."""
    reader, writer = pipe
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_pump_up(stream, writer))
            both.create_task(_pump_down(reader, stream))
    except* (OSError, RecessError) as group:
        raise Unavailable(f"the tunnel broke: {group.exceptions[0]}") from group
    finally:
        abort(writer)


async def accept_connect(guest: GuestSide) -> bytes:
    """Answer CONNECT with 200; return what the guest has sent after its request already."""
    await guest.send(h11.Response(status_code=200, headers=[("Via", "1.1 recess-broker")]))
    guest.responded = True
    return guest.take_trailing()


async def _pump_up(stream: ByteStream, writer: asyncio.StreamWriter) -> None:
    while data := await stream.read(READ_BYTES):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        if writer.can_write_eof():
            writer.write_eof()


async def _pump_down(reader: asyncio.StreamReader, stream: ByteStream) -> None:
    while data := await reader.read(READ_BYTES):
        await stream.write(data)
    await stream.close_write()
