"""The crash matrix's runtime on real machines: an embedded node that is lost and opened again over VMs that go on.

The server is lost in this process (its tasks end, nothing is said to anybody, its home is opened by the next one), the rest as
it is lost in earnest: an agent by SIGKILL in its guest, a guest by its kernel's panic, a VM by SIGKILL of its VMM. It must
know nothing of what is struck when.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from recess.config import Config
from recess.contextlog.contract import ContextLog
from recess.errors import RecessError
from recess.guestlink.link import ExecRequest, GuestLink
from recess.node.local import LocalNode
from recess.sessions.service import Sessions

AGENT_JOBS = "agent-"
ROUTE = "http://127.0.0.1:3128/route/pay"  # inside a machine; the broker knows where it leads
SETTLED_S = 120.0


class RealWorld:
    """A `Struck` over a home. `images`: names that differ, the first is the agent's."""

    def __init__(self, node: LocalNode, images: Sequence[str] = ("base",)) -> None:
        self._node = node
        self._images = images

    @property
    def node(self) -> LocalNode:
        """The server of now."""
        return self._node

    @property
    def sessions(self) -> Sessions:
        """Its sessions."""
        return self._node.sessions

    @property
    def log(self) -> ContextLog:
        """Its log."""
        return self._node.log

    async def strike(self, machine: str, victim: str) -> None:
        """Take away the agent's process, the guest ("guestd": its kernel panics) or the VMM. What is not running is let be."""
        if victim == "machine":
            for pid in vmm_processes(self._node.config.run_dir / "m" / machine):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        with contextlib.suppress(RecessError):
            link = await self._node.machines.link(machine)
            if victim == "guestd":
                await link.exec(
                    ExecRequest(argv=["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"])
                )
                return
            for job in await link.jobs():
                if job.job_id.startswith(AGENT_JOBS) and job.exit_code is None:
                    await (await link.attach(job.job_id)).signal(signal.SIGKILL)

    async def crash_server(self) -> Sessions:
        """Lose the server: its tasks end where they are, and the next one finds locks, rows and VMs."""
        node = self._node
        await node.sessions.abandon()
        for live in node.machines.fleet.all():
            watchers = (live.watcher, live.stall_watcher, live.idle_watcher, live.main.task if live.main else None)
            tasks = [task for task in watchers if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await node.close(detach=True)
        self._node = await LocalNode.open(node.config)
        return self.sessions

    async def until_state(self, session: str, state: str) -> None:
        """Wait until the session's row says so and, for one that is put away, until nobody drives it."""
        async with asyncio.timeout(SETTLED_S):
            while (row := await self.log.get(session)).state != state:
                await self.log.wait(session, row.head, 0.2)
            await self.sessions.settled(session)

    async def describe(self, session: str) -> str:
        """Return the session and its machines as text, for a failed round's message."""
        row = await self.log.get(session)
        entries = await self.log.read(session)
        lines = [f"{e.position:4} t{e.turn} {e.kind:16} {e.ref} {dict(e.body)}" for e in entries]
        told = [str(row), *lines]
        for machine in await self._node.machines.list_machines(everything=True):
            told.append(f"{machine.id} {machine.state}: {machine.status}")
            with contextlib.suppress(RecessError):
                link = await self._node.machines.link(machine.id)
                told += [f"  {job}" for job in await link.jobs()]
                told.append(
                    await _said(link, "ps axo pid,ppid,stat,wchan:20,args; ls -l /run/recess; cat /proc/loadavg")
                )
        return "\n".join([*told, *waiting_tasks()])

    async def image_of(self, machine: str) -> str:
        """Return the image that a machine was made of."""
        return (await self._node.machines.get(machine)).spec.image

    def another_image(self, present: str) -> str:
        """Return the next image that is not this one."""
        return next(name for name in self._images if name != present)

    def way_to(self, url: str) -> dict[str, Any]:
        """Return the agent's settings by which its $PAY leads to `url`: through the broker."""
        return {"env": {"PAY": ROUTE}, "routes": {"pay": url}}


def waiting_tasks() -> list[str]:
    """Return what each task of this process waits for: who stands still is among them."""
    told = []
    for task in asyncio.all_tasks():
        out = io.StringIO()
        task.print_stack(limit=4, file=out)
        told.append(f"{task.get_name()}: {out.getvalue()}")
    return told


async def _said(link: GuestLink, script: str) -> str:
    """Return what a script prints in a guest."""
    job = await link.exec(ExecRequest(argv=["sh", "-c", script]))
    said = b"".join([data async for _, data in job.output()])
    await job.wait()
    return said.decode(errors="replace")


def vmm_processes(folder: Path) -> list[int]:
    """Return the ids of the VMMs that work in a machine's folder: QEMU, not its keeper."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                program = (entry / "cmdline").read_bytes().split(b"\0")[0]
                found += [int(entry.name)] if b"qemu-system" in program else []
    return found


@asynccontextmanager
async def real_world(config: Config, images: Sequence[str] = ("base",)) -> AsyncIterator[RealWorld]:
    """Open a node over a home; at the end its sessions are closed and its machines put away."""
    w = RealWorld(await LocalNode.open(config), images)
    try:
        yield w
    finally:
        with contextlib.suppress(RecessError):
            for row in await w.sessions.list_sessions():
                await w.sessions.close(row.id)
        await w.node.close(detach=False)
