"""The manager over real guests: what the fake driver's tests say is true of machines, said again by machines.

One home for the whole file, so that the template is booted once; every test opens a node on it and removes what it made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from recess.broker import Authorities, parse_bindings
from recess.config import Config, load_config
from recess.errors import HomeLocked, IllegalState, NotFound
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.scan import blobs_that_hold, files_that_hold, process_holds
from tests.conftest import left_processes

SPEC = MachineSpec(memory_bytes=384 << 20, disk_bytes=1 << 30)
pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def config(tmp_path_factory, images_dir):
    home = tmp_path_factory.mktemp("manager") / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    run_dir = base / f"recess-m-{secrets.token_hex(4)}"
    yield load_config({}, home=str(home), run_dir=str(run_dir), driver="qemu")
    left = left_processes(run_dir, home)
    folders = list((run_dir / "m").glob("*"))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(run_dir, ignore_errors=True)
    assert not left
    assert not folders


@asynccontextmanager
async def opened(config: Config):
    """A node; what was made on it is removed at the end."""
    holder = {"node": await LocalNode.open(config)}
    try:
        yield holder
    finally:
        node = holder["node"]
        for row in await node.machines.list_machines(everything=True):
            await node.machines.remove(row.id, force=True)
        await node.close()


async def sh(node: LocalNode, ref: str, script: str) -> str:
    row = await node.machines.get(ref)
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["sh", "-c", script], cwd="/root"))
    out = b""
    async for _, data in job.output():
        out += data
    assert await job.wait() == 0, out
    return out.decode().strip()


async def get(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /page.html HTTP/1.0\r\n\r\n")
    page = await reader.read()
    writer.close()
    await writer.wait_closed()
    return page


def vm_pids(config: Config, machine_id: str) -> list[int]:
    """The processes (QEMU and its keeper) that work in this machine's run folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink() == config.run_dir / "m" / machine_id:
                found.append(int(entry.name))
    return found


COUNTER = (
    "import http.server, os, threading, time\n"
    "nonce = os.urandom(8).hex()\n"
    "class H(http.server.SimpleHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        body = (nonce + ' ' + str(count)).encode()\n"
    "        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()\n"
    "        self.wfile.write(body)\n"
    "    def log_message(self, *a): pass\n"
    "count = 0\n"
    "server = http.server.ThreadingHTTPServer(('127.0.0.1', 8000), H)\n"
    "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
    "print('up', flush=True)\n"
    "while True:\n"
    "    count += 1\n"
    "    time.sleep(0.05)\n"
)


async def test_the_way_of_a_machine(config):
    """Main process, published port, nonce in RAM, lunch, fork, restart of the server: always the same process."""
    async with opened(config) as at:
        node = at["node"]
        spec = replace(SPEC, argv=("python3", "-c", COUNTER), ports=(("127.0.0.1", 0, 8000),), env={"WHO": "me"})
        row = await node.machines.create(spec, name="dev")
        while b"up" not in (await node.machines.output("dev")).data:
            await asyncio.sleep(0.05)
        first = await get(row.meta["ports"][0][1])
        nonce, count = first.split(b"\r\n\r\n")[1].split()
        assert await sh(node, "dev", "echo $WHO; hostname; cat /etc/machine-id | wc -c") == "me\ndev\n33"
        boot_id = await sh(node, "dev", "cat /proc/sys/kernel/random/boot_id; echo kept > /root/file")

        # lunch: no process is left, and what comes back is the same in every respect
        snap = await node.machines.suspend("dev", why="idle")
        assert vm_pids(config, row.id) == []
        assert snap.figures["forkable"]
        assert snap.figures["new_bytes"] < 6_000_000
        report = await node.machines.resume("dev")
        assert (report.rung, report.snapshot) == (2, snap.id)
        row = await node.machines.get("dev")
        again = (await get(row.meta["ports"][0][1])).split(b"\r\n\r\n")[1].split()
        assert again[0] == nonce
        assert int(again[1]) >= int(count)
        assert (
            await sh(node, "dev", "cat /proc/sys/kernel/random/boot_id; cat /root/file") == f"{boot_id}\nkept".strip()
        )

        # the clock is right, and time did not stop for the process
        guest = float(await sh(node, "dev", "date +%s.%N"))
        assert abs(guest - time.time()) < 5

        # fork: same nonce, another identity, other random bytes
        children = await node.machines.fork("dev", 2, names=["c1", "c2"])
        seen = set()
        for child in children:
            page = (await get(child.meta["ports"][0][1])).split(b"\r\n\r\n")[1].split()
            assert page[0] == nonce
            script = "hostname; cat /etc/machine-id /run/recess/generation; head -c 16 /dev/urandom | od -An -tx1"
            seen.update((await sh(node, child.id, script)).splitlines())
        assert len(seen) == 8
        await sh(node, "c1", "echo mine > /root/file")
        assert await sh(node, "c2", "cat /root/file") == "kept"
        for name in ("c1", "c2"):
            await node.machines.remove(name, force=True)

        # a new server takes the machine over; the old one let go of it
        await node.close(detach=True)
        node = at["node"] = await LocalNode.open(config)
        assert node.recovered["adopted"] == 1
        row = await node.machines.get("dev")
        assert (await get(row.meta["ports"][0][1])).split(b"\r\n\r\n")[1].split()[0] == nonce
        assert (await node.machines.output("dev")).data.count(b"up") == 1
        await node.machines.stop("dev")
        assert (await node.machines.get("dev")).exit_code == 143
        assert vm_pids(config, row.id) == []


async def test_pause_snapshot_evict_restore_as(config):
    async with opened(config) as at:
        node = at["node"]
        row = await node.machines.create(SPEC, name="parked")
        await sh(node, "parked", "echo ram > /dev/shm/x; echo disk > /root/x")
        await node.machines.pause("parked")
        snap = await node.machines.snapshot("parked", resume=False, why="idle", log_position=5, epoch=2)
        with pytest.raises(IllegalState):
            await node.machines.link(row.id)
        assert (await node.machines.resume("parked")).rung == 1
        assert await sh(node, "parked", "cat /dev/shm/x /root/x") == "ram\ndisk"
        await sh(node, "parked", "echo later > /dev/shm/x; echo later > /root/x; sync")
        await node.machines.kill("parked", why="test")
        again, report = await node.machines.restore(snap.id, machine_id=row.id, epoch=3)
        assert (again.id, report.log_position) == (row.id, 5)
        assert await sh(node, "parked", "cat /dev/shm/x /root/x; cat /run/recess/epoch") == "ram\ndisk\n3"
        second = await node.machines.snapshot("parked", name="keep:v1")
        assert second.parent == snap.id
        assert (await node.machines.verify_snapshot("keep:v1"))["template"]


async def test_a_killed_vm_falls_to_its_snapshot_and_bad_commands_leave_nothing(config):
    async with opened(config) as at:
        node = at["node"]
        with pytest.raises(NotFound):
            await node.machines.create(replace(SPEC, argv=("/no/such/program",)))
        with pytest.raises(NotFound):
            await node.machines.create(replace(SPEC, image="no-such-image"))
        assert await node.machines.list_machines(everything=True) == []
        row = await node.machines.create(SPEC, name="shot")
        await sh(node, "shot", "echo one > /dev/shm/x")
        await node.machines.snapshot("shot")
        pids = vm_pids(config, row.id)
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await node.machines.wait_dead(row.id)
        assert (await node.machines.get("shot")).state == "suspended"
        report = await node.machines.resume("shot")
        assert "lost" in report.why
        assert await sh(node, "shot", "cat /dev/shm/x") == "one"


SERVER = """
import asyncio, sys
from recess.config import load_config
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.scan import blobs_that_hold, files_that_hold, process_holds
async def main():
    node = await LocalNode.open(load_config({}, home=sys.argv[1], run_dir=sys.argv[2], driver="qemu"))
    row = await node.machines.create(MachineSpec(memory_bytes=384 << 20, disk_bytes=1 << 30), name="orphan")
    print(row.id, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_server_killed_by_sigkill_is_followed_by_one_that_adopts(config):
    src = str(Path(__file__).parents[2] / "src")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(config.home), str(config.run_dir)], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": src},
    )  # fmt: skip
    try:
        line = (await asyncio.to_thread(server.stdout.readline)).decode().strip()
        assert re.fullmatch(r"mch_\w+", line)
        with pytest.raises(HomeLocked):
            await LocalNode.open(config)
    finally:
        server.kill()
        server.communicate()
    async with opened(config) as at:
        node = at["node"]
        assert node.recovered["adopted"] == 1
        assert await sh(node, "orphan", "echo alive") == "alive"
        snap = await node.machines.suspend("orphan")
        assert snap.why == "suspend"
        await node.machines.resume("orphan")
        assert await sh(node, "orphan", "echo back") == "back"


# --- secrets ----------------------------------------------------------------------------------------------------

VALUE = "sk-" + secrets.token_hex(24)
ASK = """
import os, urllib.request
request = urllib.request.Request(os.environ["AT"] + "/py", headers={"x-api-key": os.environ["TOKEN"]})
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


class Upstream:
    """A TLS server on loopback that keeps the heads of the requests that reach it."""

    def __init__(self):
        self.heads = []
        self.port = 0

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            await writer.drain()
        writer.close()


@pytest.fixture
async def upstream(tmp_path, monkeypatch):
    """It is `localhost` by its certificate, which this process (the broker) is told to trust."""
    authorities = Authorities(tmp_path / "upstream.key")
    its = authorities.open("ca_up", parse_bindings(["U@localhost"]))
    (tmp_path / "upstream.pem").write_bytes(its.certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "upstream.pem"))
    up = Upstream()
    context = authorities.server_context(its, "localhost", time.time())
    server = await asyncio.start_server(up.serve, "127.0.0.1", 0, ssl=context)
    up.port = server.sockets[0].getsockname()[1]
    yield up
    server.close()


async def ask(node, machine, port):
    """Use the secret as programs do: curl with a header, Python with the bundle from the environment."""
    link = await node.machines.link(machine)
    # `localhost` is left out of proxying by every client's default; here it stands for a host far away.
    env = {"AT": f"https://localhost:{port}", "NO_PROXY": "", "no_proxy": "", "ASK": ASK}
    script = 'curl -sS --noproxy "" -H "Authorization: Bearer $TOKEN" $AT/curl && python3 -c "$ASK"'
    job = await link.exec(ExecRequest(argv=("/bin/sh", "-c", script), env=env))
    out = b"".join([piece async for _, piece in job.output()])
    assert (await job.wait(), out) == (0, b"hellohello\n")


async def test_a_secret_is_used_by_curl_and_python_and_is_nowhere_but_on_the_wire(config, upstream):
    """Looked for in the VMMs' memory, in every file of the home (database, logs, disks) and in every stored blob, unpacked by
    plain zstd. A marker that the guest does hold must be found in each place the secret is looked for."""
    async with opened(config) as holder:
        await use_and_look(holder["node"], upstream)


async def use_and_look(node, upstream):
    node.secrets.put("TOKEN", VALUE)
    bound = f"TOKEN@localhost:{upstream.port}"
    spec = MachineSpec(
        memory_bytes=384 << 20, disk_bytes=1 << 30, secrets=(bound,), allow=(f"127.0.0.1:{upstream.port}",)
    )  # fmt: skip
    row = await node.machines.create(spec, name="holder")
    await ask(node, row.id, upstream.port)
    marker = "mark-" + secrets.token_hex(24)
    link = await node.machines.link(row.id)
    for path in ("/root/on-disk", "/dev/shm/in-memory"):
        await link.write_file(path, f"{marker} {path}\n".encode() * 2000)

    taken = await node.machines.snapshot(row.id)
    child, _ = await node.machines.restore(taken.id, name="restored")
    (forked,) = await node.machines.fork(row.id)
    for machine in (child.id, forked.id):
        await ask(node, machine, upstream.port)
    assert len(upstream.heads) == 6
    assert all(VALUE in head and "recess-secret" not in head for head in upstream.heads)

    pids = [pid for machine in (row.id, child.id, forked.id) for pid in vmm_of(node, machine)]
    assert len(pids) == 3
    assert [process_holds(pid, marker.encode()) for pid in pids] == [True] * 3
    assert [process_holds(pid, VALUE.encode()) for pid in pids] == [False] * 3

    await node.machines.suspend(row.id)
    config = node.config
    kept = {config.home / "secrets" / "TOKEN"}
    assert files_that_hold(config.home, VALUE.encode()) == kept
    assert files_that_hold(config.run_dir, VALUE.encode()) == set()
    assert blobs_that_hold(config.blobs_dir, VALUE.encode()) == set()
    assert blobs_that_hold(config.blobs_dir, marker.encode())
    assert files_that_hold(config.home, b"recess-secret-TOKEN") | files_that_hold(
        config.run_dir, b"recess-secret-TOKEN"
    )


def vmm_of(node, machine):
    """The processes that work in this machine's run folder and are a VMM."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes()
            if (folder / "cwd").readlink().name == machine and re.match(rb"[^\0]*qemu-system", line):
                found.append(int(folder.name))
    return found
