"""Unix sockets: a machine's ports and sockets at paths of the host, the host's sockets at paths of a machine."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from recess.broker import Broker, OpenGate, SecretStore
from recess.clock import SystemClock
from recess.errors import Conflict, InvalidSpec, RecessError
from recess.machines.arrivals import asks_for
from recess.machines.launching import child_spec
from recess.machines.manager import Manager
from recess.machines.records import spec_to_json
from recess.testing.machine_room import SMALL


async def get(path):
    async with asyncio.timeout(30):
        while True:  # the program in the machine may be on its way
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /none HTTP/1.0\r\n\r\n")
            head = await reader.readline()
            writer.close()
            await writer.wait_closed()
            if head:
                return head


@pytest.mark.parametrize("inner", [80, "/run/app.sock"])
async def test_a_port_or_socket_of_a_machine_is_served_at_a_path_of_the_host(room, tmp_path, inner):
    path = str(tmp_path / "app.sock")
    spec = replace(SMALL, argv=("httpd", str(inner)), ports=((path, 0, inner),))
    row = await room.manager.create(spec, name="web")
    assert row.meta["ports"] == [[path, 0, inner]]
    assert (tmp_path / "app.sock").stat().st_mode & 0o777 == 0o600
    assert b"404" in await get(path)
    await room.manager.suspend("web")
    assert not (tmp_path / "app.sock").exists()
    await room.manager.resume("web")
    assert b"404" in await get(path)


async def test_a_path_that_is_taken_is_left_alone_and_one_that_a_dead_server_left_is_taken_over(room, tmp_path):
    path = tmp_path / "app.sock"
    spec = replace(SMALL, ports=((str(path), 0, 80),))
    path.write_text("mine")
    with pytest.raises(Conflict, match="no socket"):
        await room.manager.create(spec, name="one")
    assert path.read_text() == "mine"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
        held.listen()
        with pytest.raises(Conflict, match="somebody serves"):
            await room.manager.create(spec, name="two")
    await room.manager.create(spec, name="three")  # whoever held it is gone, the file is still there
    with pytest.raises(InvalidSpec, match="cannot listen"):
        await room.manager.create(replace(SMALL, ports=((str(tmp_path / "no/folder.sock"), 0, 80),)))


@pytest.mark.parametrize(
    "port",
    [
        ("/a.sock", 8080, 80),
        ("/" + "x" * 120, 0, 80),
        ("127.0.0.1", 0, "relative"),
        ("127.0.0.1", 0, ""),
        ("/a/../b", 0, 80),
    ],
)
async def test_ports_that_cannot_be(room, port):
    with pytest.raises(InvalidSpec):
        await room.manager.create(replace(SMALL, ports=(port,)))


def test_a_child_has_the_ports_on_other_ports_and_leaves_the_path_to_its_parent():
    spec = replace(SMALL, ports=(("/a.sock", 0, 80), ("127.0.0.1", 8080, "/b.sock")), sockets=(("/h", "/g"),))
    child = child_spec(spec)
    assert child.ports == (("127.0.0.1", 0, "/b.sock"),)
    assert child.sockets == (("/h", "/g"),)


def test_a_snapshot_from_elsewhere_says_that_it_asks_for_them():
    spec = replace(SMALL, ports=(("/a.sock", 0, 80),), sockets=(("/run/docker.sock", "/run/d.sock"),))
    asked = asks_for({"spec": {"machine": spec_to_json(spec)}}, "snp_x")
    assert asked == ["listen on /a.sock", "use the host's socket /run/docker.sock"]


@asynccontextmanager
async def service(path):
    """A socket of the host that says how it was greeted."""

    async def serve(reader, writer):
        writer.write(b"hello " + await reader.readline())
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    yield
    server.close()


@pytest.fixture
async def brokered(room):
    """The room with a broker."""
    await room.manager.close(detach=True)
    broker = Broker(OpenGate(), SecretStore(), SystemClock())
    room.parts = replace(room.parts, egress=broker)
    room.manager = Manager(room.parts)
    await room.manager.recover()
    broker.bind(room.manager.siblings)
    return room, broker


async def test_a_machine_uses_a_socket_of_the_host_after_a_restore_too_and_no_other(brokered, tmp_path):
    room, broker = brokered
    path = str(tmp_path / "host.sock")
    async with service(path):
        row = await room.manager.create(replace(SMALL, sockets=((path, "/run/host.sock"),)), name="dev")
        assert await room.sh("dev", "knock /run/host.sock dev") == "hello dev\n"
        child = (await room.manager.fork("dev"))[0]
        assert await room.sh(child.name, "knock /run/host.sock child") == "hello child\n"
        await room.manager.suspend("dev")
        await room.manager.resume("dev")
        assert await room.sh("dev", "knock /run/host.sock again") == "hello again\n"
    assert await room.sh("dev", "knock /run/host.sock late") == ""  # it is gone: hung up on
    verdicts = [(one.verb, one.host, one.allowed) for one in broker.decisions(row.id)]
    assert verdicts == [("socket", path, True)] * 2 + [("socket", path, False)]
    other = await room.manager.create(SMALL, name="other")
    await (await room.manager.link(other.id)).write_file("/run/host.sock", b"")
    assert await room.sh("other", "knock /run/host.sock x") == ""
    assert [(one.host, one.allowed) for one in broker.decisions(other.id)] == [("/run/host.sock", False)]


async def test_a_machine_that_has_lost_its_lease_uses_no_socket(room, tmp_path):
    class Shut(OpenGate):
        def may_act(self, machine_id, epoch):
            return False

    path = str(tmp_path / "host.sock")
    await room.manager.close(detach=True)
    broker = Broker(Shut(), SecretStore(), SystemClock())
    room.parts = replace(room.parts, egress=broker)
    room.manager = Manager(room.parts)
    await room.manager.recover()
    async with service(path):
        row = await room.manager.create(replace(SMALL, sockets=((path, "/run/host.sock"),)), name="dev")
        assert await room.sh("dev", "knock /run/host.sock x") == ""
    assert [(one.allowed, one.reason) for one in broker.decisions(row.id)] == [(False, "this machine may not act")]


@pytest.mark.parametrize(
    "sockets",
    [
        (("relative", "/g"),),
        (("/h", "g"),),
        (("/a", "/g"), ("/b", "/g")),
        tuple((f"/{n}", f"/{n}g") for n in range(17)),
    ],
)
async def test_sockets_that_cannot_be(room, sockets):
    with pytest.raises(RecessError, match="socket"):
        await room.manager.create(replace(SMALL, sockets=sockets))
    assert await room.manager.list_machines(everything=True) == []


async def test_none_has_no_way_to_the_hosts_sockets(room):
    with pytest.raises(InvalidSpec, match="none"):
        await room.manager.create(replace(SMALL, network="none", sockets=(("/h", "/g"),)))
