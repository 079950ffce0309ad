"""A program that plays Firecracker as far as the driver can see: its API, its vsock socket, its snapshot files. No guest.

The guest is a real guestd, as a process, behind a holder as guestd's own (guest/guestd/src/vsock.rs). "Memory" is a number of
pages: the guest writes one of them between any two snapshots. Like 1.16.1 it resets all connections when a snapshot is taken,
and lets none in after a resume until the guest was told so. What the API's description does not take is refused. Standard
library only; the working folder is the VM's own.

Arguments: the path of guestd, then Firecracker's own. Files in the working folder tell it to fail: `fail-create`, `fail-load`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # it runs isolated (-I)
from description import check

PAGE = 4096
BASE_ADDRESS = 0x7000_0000_0000


class Refused(Exception):
    """Answered with status 400."""


class Machine:
    """What the VMM has. `guestd` is the path of the real one."""

    def __init__(self, guestd: str) -> None:
        self.guestd = guestd
        self.state = "Not started"
        self.pages = 0
        self.written: dict[int, int] = {}  # page -> what it holds, of all that was written since the start
        self.dirty: set[int] = set()
        self.clock = 0
        self.told = True  # the guest knows of the reset: connections are let in
        self.reset_sent = False
        self.connections: list[asyncio.StreamWriter] = []
        self.kept: list[socket.socket] = []
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def start_guest(self) -> None:
        ours, theirs = socket.socketpair()
        subprocess.Popen([self.guestd, "--serve-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        self.reader, self.writer = await asyncio.open_connection(sock=ours)
        await asyncio.start_unix_server(self.connected, "v.sock")

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One vsock connection: the holder's side of it."""
        self.connections.append(writer)
        await reader.readline()
        while not (self.state == "Running" and self.told):
            await asyncio.sleep(0.01)
        writer.write(b"OK 1\n")
        assert self.reader is not None
        assert self.writer is not None
        down = asyncio.create_task(self.down(writer))
        try:
            while length := int.from_bytes(await reader.readexactly(4), "little"):
                self.writer.write(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        down.cancel()
        writer.close()

    async def down(self, writer: asyncio.StreamWriter) -> None:
        assert self.reader is not None
        while piece := await self.reader.read(65536):
            writer.write(piece)

    def pause(self) -> None:
        self.state = "Paused"
        self.reset_sent = False

    def resume(self) -> None:
        self.told = self.reset_sent
        self.state = "Running"

    def work(self) -> None:
        """The guest writes a page."""
        self.clock += 1
        number = self.clock % self.pages
        self.written[number] = self.clock % 251 + 1
        self.dirty.add(number)

    def create(self, body: dict[str, Any]) -> None:
        if self.state != "Paused":
            raise Refused("the microVM is not paused")
        self.reset_sent = True
        for writer in self.connections:
            writer.close()
        self.work()
        Path(body["snapshot_path"]).write_text(json.dumps({"pages": self.pages, "clock": self.clock}))
        numbers = self.dirty if body["snapshot_type"] == "Diff" else set(range(self.pages))
        self.dirty = set()
        with open(body["mem_file_path"], "r+b" if Path(body["mem_file_path"]).exists() else "wb") as handle:
            handle.truncate(self.pages * PAGE)
            for number in numbers:
                os.pwrite(handle.fileno(), bytes([self.written.get(number, 0)]) * PAGE, number * PAGE)
        if Path("fail-create").exists():  # after the list was cleared: the worst moment
            raise Refused("No space left on device")

    async def load(self, body: dict[str, Any]) -> None:
        try:
            state = json.loads(Path(body["snapshot_path"]).read_bytes())
            self.pages, self.clock = state["pages"], state["clock"]
        except (ValueError, KeyError, TypeError) as exc:
            raise Refused("Load snapshot error: invalid magic") from exc
        backend = body["mem_backend"]
        if backend["backend_type"] == "File":
            data = Path(backend["backend_path"]).read_bytes()
            if len(data) != self.pages * PAGE:
                raise Refused("the memory file has another size")
            self.written = {n: data[n * PAGE] for n in range(self.pages) if data[n * PAGE]}
        else:
            await self.ask_for_pages(backend["backend_path"])
        if Path("fail-load").exists():
            raise Refused("Load snapshot error: something")
        self.state = "Paused"
        self.reset_sent = True
        await self.start_guest()

    async def ask_for_pages(self, path: str) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        both = {"page_size": PAGE, "page_size_kib": PAGE}
        region = {"base_host_virt_addr": BASE_ADDRESS, "size": self.pages * PAGE, "offset": 0, **both}
        fd = os.memfd_create("uffd")
        socket.send_fds(sock, [json.dumps([region]).encode()], [fd])
        self.kept.append(sock)
        while not Path("served").exists():  # as device state is: read while the pages are brought
            await asyncio.sleep(0.01)

    async def answer(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Do what one request asks."""
        if (method, path) == ("GET", "/"):
            return {"id": "fake", "state": self.state, "vmm_version": "1.16.1", "app_name": "Firecracker"}
        if wrong := check(method, path, body):
            raise Refused("; ".join(wrong))
        if path == "/machine-config":
            self.pages = body["mem_size_mib"] * 1024 * 1024 // PAGE
        elif path == "/actions":
            self.state = "Running"
            self.work()
            print("console of the guest", flush=True)
            await self.start_guest()
        elif path == "/vm":
            self.pause() if body["state"] == "Paused" else self.resume()
        elif path == "/snapshot/create":
            self.create(body)
        elif path == "/snapshot/load":
            await self.load(body)
        elif path.startswith("/drives/") and not Path(body["path_on_host"]).exists():
            raise Refused(f"no such file: {body['path_on_host']}")
        return None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the API, with one request."""
        fatal = False
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            length = next((int(line.split(":")[1]) for line in head if line.startswith("Content-Length")), 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            try:
                answer, status = await self.answer(method, path, body), "200 OK"
            except Refused as exc:
                answer, status = {"fault_message": str(exc)}, "400 Bad Request"
                fatal = path == "/snapshot/load"
            data = b"" if answer is None else json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
        if fatal:
            os._exit(1)


async def main() -> None:
    """Serve the API until killed."""
    api = sys.argv[sys.argv.index("--api-sock") + 1]
    machine = Machine(sys.argv[1])
    await asyncio.start_unix_server(machine.serve, api)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
