"""One lasting channel over vsock connections that come and go, to a real guestd behind a socket that plays Firecracker's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from recess.drivers.firecracker.calls import GUEST_PORT, VSOCK_SOCKET
from recess.drivers.firecracker.port import Port
from recess.drivers.kept.layout import socket_address
from recess.errors import DriverFailed, RecessError, Timeout
from recess.testing.guestlink_process import guestd_process


class Machine:
    """Firecracker's socket and guestd's holder behind it (guest/guestd/src/vsock.rs), over a real guestd."""

    def __init__(self, guest_path: str) -> None:
        self.guest_path = guest_path
        self.refusals = 0
        self.lets_go = True
        self.asked: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self, run: Path) -> None:
        self.guest_reader, self.guest_writer = await asyncio.open_unix_connection(self.guest_path)
        with socket_address(run, VSOCK_SOCKET) as address:
            self.server = await asyncio.start_unix_server(self.join, address)

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.asked.append(await reader.readline())
        if self.refusals:
            self.refusals -= 1
            writer.close()
            return
        writer.write(b"OK 1073741824\n")
        down = asyncio.create_task(self._down(writer))
        try:
            while length := int.from_bytes(await reader.readexactly(4), "little"):
                self.guest_writer.write(await reader.readexactly(length))
            if not self.lets_go:
                await asyncio.Event().wait()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            down.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await down
            writer.close()

    async def _down(self, writer: asyncio.StreamWriter) -> None:
        while piece := await self.guest_reader.read(65536):
            writer.write(piece)

    def close(self) -> None:
        self.server.close()
        self.guest_writer.close()
        for writer in self.writers:
            writer.close()


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with guestd_process(tmp_path / "guest") as guest:
        await guest.link.close()
        machine = Machine(guest.socket_path)
        await machine.start(tmp_path)
        yield machine
        machine.close()


@pytest.fixture
async def port(machine: Machine, tmp_path: Path) -> AsyncIterator[Port]:
    made = Port(tmp_path, hello_timeout_s=60)
    yield made
    await made.close()
    await made.close()


async def test_the_link_lives_over_connections(port: Port, machine: Machine) -> None:
    with pytest.raises(DriverFailed):
        _ = port.link
    await port.attach()
    link = port.link
    await link.ping(timeout_s=60)
    for round_ in range(3):
        await port.leave()
        await port.leave()
        waiting = asyncio.ensure_future(link.info())  # written while nobody carries it
        await asyncio.sleep(0)
        assert not waiting.done()
        await port.attach()
        await port.attach()
        assert (await asyncio.wait_for(waiting, 60))["proto"] == 1, round_
    assert port.link is link
    assert machine.asked == [b"CONNECT %d\n" % GUEST_PORT] * 4


async def test_it_asks_again_until_guestd_listens(port: Port, machine: Machine) -> None:
    machine.refusals = 3
    await port.attach()
    assert len(machine.asked) == 4
    await port.link.ping(timeout_s=60)


async def test_a_guest_that_never_listens_is_a_timeout(machine: Machine, tmp_path: Path) -> None:
    machine.refusals = 1_000_000
    port = Port(tmp_path, hello_timeout_s=0.05)
    with pytest.raises(Timeout, match="guestd did not answer"):
        await port.attach()
    await port.close()


async def test_a_connection_that_breaks_ends_the_link(port: Port, machine: Machine) -> None:
    await port.attach()
    machine.writers[-1].transport.abort()
    with pytest.raises(RecessError):
        await port.link.ping(timeout_s=60)


async def test_a_guest_that_does_not_let_go_is_a_timeout(
    port: Port, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recess.drivers.firecracker.port._LEAVE_TIMEOUT_S", 0.05)
    await port.attach()
    machine.lets_go = False
    with pytest.raises(Timeout, match="put away"):
        await port.leave()
    with pytest.raises(RecessError):
        await port.link.ping(timeout_s=60)
