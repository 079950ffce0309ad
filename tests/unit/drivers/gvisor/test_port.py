"""One lasting channel over relays that come and go: nothing is lost, nothing is sent twice, an end is an end."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from recess.drivers.gvisor.port import Port
from recess.errors import DriverFailed, RecessError
from recess.testing.guestlink_process import guestd_process

# A relay as guestd's is, over a socket of the host's: the end of its input is passed on, its own end follows.
RELAY = """
import os, socket, sys, threading
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
def up():
    while piece := os.read(0, 65536):
        door.sendall(piece)
    door.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while piece := door.recv(65536):
    os.write(1, piece)
"""


class Holder:
    """The lasting side, as guestd's holder keeps it: a connection to a real guestd, joined to one relay at a time."""

    def __init__(self, guest_path: str, path: str) -> None:
        self.guest_path, self.path = guest_path, path
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Holder:
        self.reader, self.writer = await asyncio.open_unix_connection(self.guest_path)
        self.server = await asyncio.start_unix_server(self.join, self.path)
        return self

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def down() -> None:
            while piece := await self.reader.read(65536):
                writer.write(piece)

        task = asyncio.create_task(down())
        while piece := await reader.read(65536):
            self.writer.write(piece)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        writer.close()

    async def __aexit__(self, *_exc: object) -> None:
        self.server.close()
        self.writer.close()


async def start_relay(path: str, end: socket.socket) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "/usr/bin/env", "python3", "-c", RELAY, path, stdin=end.fileno(), stdout=end.fileno()
    )


@pytest.fixture
async def port(tmp_path):
    async with guestd_process(tmp_path / "guest") as guest, Holder(guest.socket_path, str(tmp_path / "h")):
        await guest.link.close()
        made = Port(lambda end: start_relay(str(tmp_path / "h"), end), hello_timeout_s=10)
        yield made
        await made.close()
        await made.close()


async def test_the_link_lives_over_relays(port):
    with pytest.raises(DriverFailed):
        _ = port.link
    await port.attach()
    link = port.link
    await link.ping()
    for round_ in range(3):
        await port.leave()
        await port.leave()
        waiting = asyncio.ensure_future(link.info())  # written while nobody carries it
        await asyncio.sleep(0)
        assert not waiting.done()
        await port.attach()
        await port.attach()
        assert (await asyncio.wait_for(waiting, 10))["proto"] == 1, round_
    assert port.link is link


async def test_a_relay_that_dies_ends_the_link(port):
    await port.attach()
    port._process.kill()
    with pytest.raises(RecessError):
        await port.link.ping(timeout_s=10)
