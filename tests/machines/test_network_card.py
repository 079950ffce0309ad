"""`--net full` on real machines: what the card reaches, and what becomes of it over a snapshot, a fork and a restart.

One machine goes through it all: made under the operator's default (`public`), then brought back by a server that lets cards
reach everything (`open`), which is how this host's loopback can stand for the internet here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from dataclasses import replace

import pytest

from recess.errors import Unsupported
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from tests.machines.test_manager import sh

SPEC = MachineSpec(memory_bytes=256 << 20, disk_bytes=1 << 30, network="full")
pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]

# Says for each place what came of a connection: the name of an error, or what was answered.
CONNECT = """python3 - <<'EOF'
import errno, socket
def tcp(host, port):
    with socket.create_connection((host, port), 20) as s:
        s.sendall(b"hello")
        return s.recv(99).decode()
def udp(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(20)
        s.connect((host, port))
        s.send(b"hello")
        return s.recv(99).decode()
for call, host, port in ((tcp, "10.0.2.2", TCP), (udp, "10.0.2.2", UDP), (tcp, "169.254.169.254", 80), (tcp, "10.0.2.3", TCP)):
    try:
        print(call(host, port))
    except OSError as e:
        print(errno.errorcode.get(e.errno, e))
    if OPEN and call is udp:
        break
EOF"""

# Keeps a connection open, and says in a file how it ended.
HOLD = """python3 -c '
import os, socket
s = socket.create_connection(("10.0.2.2", TCP), 20)
s.sendall(b"held"); s.recv(99)
if os.fork(): os._exit(0)
os.setsid()
s.settimeout(30)
while not os.path.exists("/run/go"): __import__("time").sleep(0.05)
try:
    s.sendall(b"again"); got = s.recv(99)
except OSError as e: got = e
open("/run/ended.new", "w").write(repr(got)); os.rename("/run/ended.new", "/run/ended")
' > /dev/null 2>&1 < /dev/null"""


class Loopback(asyncio.DatagramProtocol):
    """A TCP and a UDP service on the host's loopback, that answer with what they were sent."""

    def __init__(self) -> None:
        self.calls = 0

    @contextlib.asynccontextmanager
    async def serving(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        try:
            yield server.sockets[0].getsockname()[1], transport.get_extra_info("sockname")[1]
        finally:
            transport.close()
            server.close()

    async def _serve(self, reader, writer):
        self.calls += 1
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(99):
                writer.write(b"tcp " + data)
        writer.close()

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.calls += 1
        self.transport.sendto(b"udp " + data, addr)


def script(text: str, ports: tuple[int, int], *, open_: bool = False) -> str:
    words = {"TCP": ports[0], "UDP": ports[1], "OPEN": open_}
    return functools.reduce(lambda said, word: said.replace(word, str(words[word])), words, text)


async def test_a_card_through_a_machines_lives(real_config):
    loopback = Loopback()
    async with loopback.serving() as ports:
        node = await LocalNode.open(real_config)
        try:
            row = await node.machines.create(SPEC, name="carded")
            assert "10.0.2.3" in await sh(node, "carded", "cat /etc/resolv.conf")
            refused = await sh(node, "carded", script(CONNECT, ports))
            assert refused.split() == ["EHOSTUNREACH"] * 4
            assert loopback.calls == 0
            assert "card" in (await node.machines.get("carded")).meta["network"]
            await node.machines.suspend("carded")
        finally:
            await node.close()

        node = await LocalNode.open(replace(real_config, network_cards="off"))
        try:
            with pytest.raises(Unsupported, match="no network card"):
                await node.machines.create(replace(SPEC, network="full"))
            with pytest.raises(Unsupported, match="no network card"):
                await node.machines.resume("carded")
        finally:
            await node.close()

        node = await LocalNode.open(replace(real_config, network_cards="open"))
        try:
            report = await node.machines.resume("carded")
            assert report is not None
            assert "gone" in (await node.machines.get("carded")).status
            reached = script(CONNECT, ports, open_=True)
            assert await sh(node, "carded", reached) == "tcp hello\nudp hello"
            await sh(node, "carded", script(HOLD, ports))
            children = await node.machines.fork("carded", 2)
            said = await asyncio.gather(*(sh(node, child.id, reached) for child in children))
            assert said == ["tcp hello\nudp hello"] * 2
            end = "touch /run/go; while [ ! -e /run/ended ]; do sleep 0.1; done; cat /run/ended"
            ends = await asyncio.gather(*(sh(node, ref, end) for ref in ("carded", *(c.id for c in children))))
            assert ends[0] == "b'tcp again'"  # a live capture cuts nothing
            assert all("reset" in text for text in ends[1:])
            assert row.id == (await node.machines.get("carded")).id
        finally:
            for found in await node.machines.list_machines(everything=True):
                await node.machines.remove(found.id, force=True)
            await node.close()
