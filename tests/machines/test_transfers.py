"""Real machines that travel: restored in homes that never saw them, from one file, and straight from a bucket.

The proof that it is the same machine and not a fresh one: a nonce that only a process's memory holds, and a file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from recess.config import load_config
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.blob_server import s3_server
from tests.conftest import left_processes

SPEC = MachineSpec(memory_bytes=384 << 20, disk_bytes=1 << 30)
SERVER = """
import http.server, os
NONCE = os.urandom(16).hex()
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(NONCE.encode())
http.server.HTTPServer(("127.0.0.1", 8000), Answer).serve_forever()
"""
ASK = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000', timeout=60).read().decode())"
pytestmark = [pytest.mark.machines, pytest.mark.timeout(400)]


@pytest.fixture
def home(tmp_path, images_dir):
    """A maker of homes that share images and nothing else; all must be clean of processes at the end."""
    places = []

    def make(name, with_images=True, **overrides):
        folder = tmp_path / name
        folder.mkdir(mode=0o700)
        if with_images:
            (folder / "images").symlink_to(images_dir)
        base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
        run_dir = base / f"recess-x-{secrets.token_hex(4)}"
        places.append((run_dir, folder))
        return load_config({}, home=str(folder), run_dir=str(run_dir), **{"driver": "qemu", **overrides})

    yield make
    left = {}
    for run_dir, folder in places:
        left |= left_processes(run_dir, folder)
        shutil.rmtree(run_dir, ignore_errors=True)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@asynccontextmanager
async def opened(config):
    node = await LocalNode.open(config)
    try:
        yield node
    finally:
        for row in await node.machines.list_machines(everything=True):
            await node.machines.remove(row.id, force=True)
        await node.close(detach=False)


async def python(node, ref, program):
    row = await node.machines.get(ref)
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["python3", "-c", program], cwd="/root"))
    out = b"".join([data async for _, data in job.output()])
    assert await job.wait() == 0, out
    return out.decode().strip()


async def at_work(node):
    """A machine with a server whose memory holds a nonce, and a file; returns the nonce."""
    row = await node.machines.create(SPEC, name="dev")
    link = await node.machines.link(row.id)
    await link.exec(ExecRequest(argv=["python3", "-c", SERVER], cwd="/root"))
    wait = "import socket, time\nwhile socket.socket().connect_ex(('127.0.0.1', 8000)): time.sleep(0.05)"
    await python(node, "dev", wait)
    await python(node, "dev", "open('/root/kept', 'w').write('yes')")
    return await python(node, "dev", ASK)


async def test_one_file_brings_a_machine_to_a_home_that_has_nothing(home, tmp_path):
    archive = tmp_path / "machine.tar"
    async with opened(home("a")) as a:
        nonce = await at_work(a)
        row = await a.machines.snapshot("dev", name="travel:v1")
        head, size, _ = await a.transfers.announce("travel:v1", with_image=True)
        with archive.open("wb") as file:
            for piece in a.transfers.pieces(head, 0):
                file.write(piece)
        assert archive.stat().st_size == size
    async with opened(home("b", with_images=False)) as b:  # nothing was ever built there
        with archive.open("rb") as file:
            done = await b.transfers.take_in(file.read, name="", trust=False)
        assert (done["snapshot"], done["missing"]) == (row.id, "")
        assert not list((b.config.blobs_dir / "files").glob("*"))
        machine, report = await b.machines.restore("travel:v1", name="arrived")
        assert report.rung == 2
        assert await python(b, machine.id, ASK) == nonce
        assert await python(b, machine.id, "print(open('/root/kept').read())") == "yes"
        # It lives on as any other: its next snapshot is stored over the template that came with it.
        later = await b.machines.snapshot("arrived")
        assert later.template == row.template
        children = await b.machines.fork("arrived", 2)
        assert [await python(b, child.id, ASK) for child in children] == [nonce, nonce]


async def test_a_second_home_restores_straight_from_the_bucket(home):
    with s3_server() as server:
        where = server.make_bucket("machines") + "/store"
        keys = {
            "s3_endpoint": server.endpoint, "s3_region": "us-east-1", "s3_access_key_id": "id",
            "s3_secret_access_key": "secret",
        }  # fmt: skip
        async with opened(home("a", store=where, **keys)) as a:
            nonce = await at_work(a)
            row = await a.machines.snapshot("dev", name="shared:v1")
            assert await python(a, "dev", ASK) == nonce
            await a.machines.suspend("dev")
            assert (await a.machines.resume("dev")).rung == 2  # what this home wrote it has copies of
            assert not any((a.config.home / "blobs").rglob("lyr_*"))
            async with opened(home("b", store=where, **keys)) as b:
                machine, report = await b.machines.restore("shared:v1", name="arrived")
                assert (report.rung, report.snapshot) == (3, row.id)
                assert await python(b, machine.id, ASK) == nonce
                moved = b.info()["store"]
                assert moved["traffic"]["read_bytes"] > 0
                before = moved["traffic"]["read_bytes"]
                again, report = await b.machines.restore(row.id, name="again")
                assert report.rung == 2
                assert await python(b, again.id, ASK) == nonce
                assert b.info()["store"]["traffic"]["read_bytes"] == before
