"""The manager over real guests: what the fake driver's tests say is true of machines, said again by machines.

One home for the whole file, so that the template is booted once; every test opens a node on it and removes what it made.
"""

from __future__ import annotations

import asyncio
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

from recess.config import Config, load_config
from recess.errors import HomeLocked, IllegalState, NotFound
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
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
    yield load_config({}, home=str(home), run_dir=str(run_dir))
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
    """The processes (QEMU and its keeper) that name this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if machine_id.encode() in command and str(config.run_dir).encode() in command:
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
        while b"up" not in await node.machines.logs("dev"):
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
        assert (await node.machines.logs("dev")).count(b"up") == 1
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
async def main():
    node = await LocalNode.open(load_config({}, home=sys.argv[1], run_dir=sys.argv[2]))
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
