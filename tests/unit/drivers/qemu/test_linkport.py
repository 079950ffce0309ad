"""The gate in the guest channel: held bytes wait, sent ones are known to have arrived."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from recess.drivers.qemu.linkport import GatedTransport


class Pair:
    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.ours = ours
        self.peer.setblocking(False)
        self.reader = asyncio.StreamReader()

    async def open(self) -> GatedTransport:
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self.reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, self.ours)
        return GatedTransport(transport, self.ours)

    async def receive(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.peer, 4096)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    pair.peer.close()


async def test_what_is_written_while_held_is_sent_after_it(pair: Pair) -> None:
    gate = await pair.open()
    gate.write(b"before")
    assert await pair.receive() == b"before"
    gate.hold()
    gate.write(b"held ")
    gate.write(b"back")
    assert gate.get_write_buffer_size() == 9
    with pytest.raises(BlockingIOError):
        pair.peer.recv(1)
    gate.release()
    assert await pair.receive() == b"held back"
    gate.close()


async def test_delivered_means_the_peer_has_read(pair: Pair) -> None:
    gate = await pair.open()
    assert gate.delivered()
    gate.write(b"x")
    assert not gate.delivered()
    assert await pair.receive() == b"x"
    assert gate.delivered()
    gate.close()


async def test_nothing_is_read_while_held(pair: Pair) -> None:
    gate = await pair.open()
    gate.hold()
    gate.resume_reading()  # whoever reads may ask for more meanwhile
    pair.peer.send(b"late")
    reading = asyncio.ensure_future(pair.reader.read(10))
    done, _ = await asyncio.wait([reading], timeout=0.05)
    assert not done
    gate.release()
    assert await reading == b"late"
    gate.close()


async def test_a_closed_channel_is_silent(pair: Pair) -> None:
    gate = await pair.open()
    gate.hold()
    gate.close()
    assert gate.is_closing()
    assert gate.delivered()
    gate.release()
