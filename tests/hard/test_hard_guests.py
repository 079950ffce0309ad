"""Other people's programs, unmodified, frozen in the middle of their work, thawed, and forked: each copy ends as it should.

Every test tells what it saw; `docs/hard-guests.md` is what was seen.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from recess.guestlink.link import ExecRequest, Job
from recess.machines.service import MachineSpec, SnapshotRow
from recess.node.local import LocalNode
from recess.testing.git_server import GitServer
from recess.testing.http_server import HttpRequest, HttpResponse
from recess.units import MIB
from tests.hard.guests import GUESTS, POSTGRES, HardGuest

pytestmark = [pytest.mark.machines, pytest.mark.timeout(1500)]


def spec_of(guest: HardGuest, driver: str) -> MachineSpec:
    memory_bytes = guest.memory_mib * MIB
    return MachineSpec(image=guest.image, memory_bytes=memory_bytes, cpus=guest.cpus, disk_bytes=2 << 30, driver=driver)


async def sh(node: LocalNode, machine: str, script: str) -> str:
    """Run a script in a machine to its end; it must succeed."""
    job = await (await node.machines.link(machine)).exec(ExecRequest(["sh", "-c", script]))
    out = b"".join([data async for _stream, data in job.output()])
    assert await job.wait() == 0, f"{script!r}: {out.decode(errors='replace')[-3000:]}"
    return out.decode()


def tell(what: str, driver: str, **seen: object) -> None:
    print(json.dumps({"guest": what, "driver": driver} | seen))


def size_of(row: SnapshotRow) -> float:
    return round(float(row.figures["new_bytes"]) / 1e6, 1)


@pytest.mark.parametrize(
    "guest", GUESTS, ids=lambda guest: guest.name.split()[0].lower() if guest.name[0] != "a" else "node"
)
async def test_frozen_midway_and_forked(node: LocalNode, driver: str, guest: HardGuest) -> None:
    """The machine is put away in the middle, comes back, and is forked in the middle; it and both children reach the end
    with the same result."""
    row = await node.machines.create(spec_of(guest, driver), name="first")
    await sh(node, row.id, guest.begin)
    await sh(node, row.id, guest.midway)
    snapshot = await node.machines.suspend(row.id)
    began = time.monotonic()
    report = await node.machines.resume(row.id)
    assert report.rung == 2
    back_s = time.monotonic() - began
    children = await node.machines.fork(row.id, 2)
    proofs = await asyncio.gather(*(sh(node, one.id, guest.proof) for one in (row, *children)))
    tell(guest.name, driver, stored_mb=size_of(snapshot), back_s=round(back_s, 2), proof=proofs[0].split("\n"))
    assert proofs[0].strip()
    assert proofs[1:] == [proofs[0]] * 2


async def test_no_committed_row_is_lost_with_the_memory(node: LocalNode, driver: str) -> None:
    """The VM is killed under pgbench. What a client was told of before is there after a cold boot, or, where files are in
    memory, what the last snapshot had."""
    row = await node.machines.create(spec_of(POSTGRES, driver), name="db")
    await sh(node, row.id, POSTGRES.begin)
    await sh(node, row.id, POSTGRES.midway)
    count = "cat /tmp/acked.* | wc -l"
    kept = int(await sh(node, row.id, count))
    await node.machines.snapshot(row.id)
    await sh(node, row.id, f"until [ $({count}) -ge {kept + 20} ]; do sleep 0.1; done")
    told = int(await sh(node, row.id, count))
    await node.machines.kill(row.id, why="pulled")
    report = await node.machines.bring_back(row.id, rungs=(2, 3) if driver == "gvisor" else (4,))
    start = POSTGRES.begin.split("createdb")[0].replace("initdb -D /root/db --no-sync >/tmp/init 2>&1; ", "") + "'"
    if report.rung == 4:
        await sh(node, row.id, start.replace("mkdir -p /root/db", "mkdir -p"))
    rows = int(
        (await sh(node, row.id, POSTGRES.proof.replace("grep 'actually processed\\|failed' /tmp/result;", ""))).split()[
            0
        ]
    )
    tell("PostgreSQL, its VM killed", driver, rung=report.rung, told=told, in_snapshot=kept, rows=rows)
    assert rows >= (told if report.rung == 4 else kept)


class Terminal:
    """A job's terminal: what is typed, and what it shows then."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._shown = job.output()

    async def type(self, keys: str, until: bytes) -> None:
        """Type, and wait until the terminal shows this."""
        await self.job.write(keys.encode())
        seen = b""
        async for _stream, data in self._shown:
            seen += data
            if until in seen:
                return
        raise AssertionError(f"the terminal ended before {until!r}: {seen!r}")


async def test_vim_in_a_terminal(node: LocalNode, driver: str) -> None:
    """An editor with unsaved text, in a shell on a pty: it and a copy of it take more text, and save each its own."""
    row = await node.machines.create(spec_of(POSTGRES, driver), name="editor")
    link = await node.machines.link(row.id)
    job = await link.exec(
        ExecRequest(["bash"], env={"TERM": "xterm"}, cwd="/root", tty=True, stdin=True, job_id="shell")
    )
    terminal = Terminal(job)
    await terminal.type("vim -u NONE note\r", b"~")
    await terminal.type("ibefore the nap ", b"nap")
    await job.detach()
    snapshot = await node.machines.suspend(row.id)
    await node.machines.resume(row.id)
    (child,) = await node.machines.fork(row.id)
    texts = {}
    for one, word in ((row, "parent"), (child, "child")):
        job = await (await node.machines.link(one.id)).attach("shell")
        terminal = Terminal(job)
        await terminal.type(f"{word}\x1b", word.encode())
        await terminal.type(":wq\r", b"written")
        await terminal.type("echo shell-$((40+2))\r", b"shell-42")
        texts[word] = await sh(node, one.id, "cat /root/note")
        await job.detach()
    tell("vim in a pty shell", driver, stored_mb=size_of(snapshot), texts=texts)
    assert texts == {"parent": "before the nap parent\n", "child": "before the nap child\n"}


class SlowGit(GitServer):
    """Hands out objects only as far as it is let."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        super().__init__(name, files)
        self.halfway, self.go_on = asyncio.Event(), asyncio.Event()

    async def answer(self, request: HttpRequest) -> HttpResponse:
        if "/objects/" in request.path and self.served >= 5:
            self.halfway.set()
            await self.go_on.wait()
        return await super().answer(request)


@asynccontextmanager
async def slow_git() -> AsyncIterator[SlowGit]:
    async with SlowGit("site", {f"file{n}": f"{n}\n".encode() * 50 for n in range(40)}) as server:
        try:
            yield server
        finally:
            server.go_on.set()


async def clones(node: LocalNode, machines: Sequence[str]) -> list[str]:
    """Return how each machine's clone ended: "whole", or git's last word."""
    out = []
    for one in machines:
        await sh(node, one, "until [ -e /root/code ]; do sleep 0.1; done")
        text = await sh(node, one, "cd /root; [ $(cat code) = 0 ] && echo whole || tail -n 1 said")
        out.append(text.strip())
    return out


async def test_git_clone_over_the_broker(node: LocalNode, driver: str) -> None:
    """A connection through the broker lives as long as its machine does: a snapshot does not cut it, a copy does not have
    it. The clone in the copy fails as a cut network would make it, and succeeds when it is repeated."""
    async with slow_git() as server:
        spec = MachineSpec(image="base", disk_bytes=1 << 30, driver=driver, routes={"git": server.url})
        row = await node.machines.create(spec, name="cloner")
        url = "http://127.0.0.1:3128/route/git/site.git"
        await sh(node, row.id, f"cd /root; (git clone -q {url} site >said 2>&1; echo $? >code) >/dev/null 2>&1 &")
        await server.halfway.wait()
        (child,) = await node.machines.fork(row.id)
        server.go_on.set()
        ends = await clones(node, [row.id, child.id])
        if ends[1] != "whole":
            await sh(node, child.id, f"cd /root; rm -rf site; git clone -q {url} site; ls site | wc -l")
        tell("git clone over the broker", driver, parent=ends[0], child=ends[1])
        assert ends[0] == "whole"
        assert int(await sh(node, child.id, "ls /root/site | wc -l")) == 40


async def test_a_suspended_clone(node: LocalNode, driver: str) -> None:
    """Put away in the middle: its connection is cut, git says so, and a repeated clone is whole."""
    async with slow_git() as server:
        spec = MachineSpec(image="base", disk_bytes=1 << 30, driver=driver, routes={"git": server.url})
        row = await node.machines.create(spec, name="cloner")
        url = "http://127.0.0.1:3128/route/git/site.git"
        await sh(node, row.id, f"cd /root; (git clone -q {url} site >said 2>&1; echo $? >code) >/dev/null 2>&1 &")
        await server.halfway.wait()
        await node.machines.suspend(row.id)
        server.go_on.set()
        await node.machines.resume(row.id)
        (end,) = await clones(node, [row.id])
        tell("git clone over the broker, suspended", driver, end=end)
        await sh(node, row.id, f"cd /root; rm -rf site; git clone -q {url} site; [ $(ls site | wc -l) = 40 ]")
