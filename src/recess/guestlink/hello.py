"""The first words on a byte channel: find guestd behind whatever an earlier connection left in it.

The hello is repeated behind padding while it stays unanswered: an earlier connection may have died in the middle of a
frame, whose end guestd still waits for. Each `greet` has a new nonce, so guestd ends the streams of former
connections, and whatever it still sent for them is skipped here. This module must know nothing of requests.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from recess.errors import GuestFailed, Timeout
from recess.guestlink import wire
from recess.guestlink.frames import FLAG_RETRY, PAD, Decoder, Frame, Garbage, Kind, encode

_HELLO_BYTES_MAX = 16 << 20  # what an old connection may have left in the channel before the hello is answered
_REPEAT_AFTER_S = (0.25, 0.5, 1.0)  # then every 2 s


async def greet(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    decoder: Decoder,
    timeout_s: float,
    thaw: Callable[[], Mapping[str, Any]] | None = None,
) -> tuple[wire.Hello, list[Frame]]:
    """Say hello; return guestd's answer and the frames that came right behind it. Raises Timeout or GuestFailed. `thaw`
    makes the thaw that each hello brings along: guestd does at most one of them."""
    nonce = secrets.token_hex(16)

    def body() -> bytes:
        return wire.hello_body(nonce, None if thaw is None else thaw())

    first = body()
    repeat = asyncio.create_task(_say_hello(writer, first, body))
    try:
        async with asyncio.timeout(timeout_s):
            return await _await_hello(reader, decoder, nonce)
    except TimeoutError:
        raise Timeout(f"guestd did not say hello in {timeout_s:g} s") from None
    except OSError as exc:
        raise GuestFailed(f"the guest channel was cut before the hello: {exc}") from exc
    finally:
        repeat.cancel()
        await asyncio.gather(repeat, return_exceptions=True)


async def _say_hello(writer: asyncio.StreamWriter, first: bytes, body: Callable[[], bytes]) -> None:
    writer.write(encode(Kind.HELLO, 0, 0, first))
    for pause_s in itertools.chain(_REPEAT_AFTER_S, itertools.repeat(2.0)):
        await writer.drain()
        await asyncio.sleep(pause_s)
        if writer.transport.get_write_buffer_size() == 0:
            writer.write(PAD + encode(Kind.HELLO, FLAG_RETRY, 0, body()))


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
