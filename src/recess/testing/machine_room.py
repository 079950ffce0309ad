"""A whole machine room without VMs: fake driver, real snapshot store over blobs in memory, real catalog on a file.

For tests of everything above drivers. `restart` plays servers that come and go over the same fake machine room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from recess.blobs import LocalBlobs, MemoryBlobs
from recess.catalog import SCHEMA, Catalog
from recess.clock import Clock, SystemClock
from recess.db import Database
from recess.drivers.fake import FakeDriver, FakeHost, FakeImages
from recess.drivers.fake.guest import Program
from recess.guestlink.link import ExecRequest
from recess.machines.manager import Manager
from recess.machines.parts import Parts
from recess.machines.service import MachineSpec
from recess.snapshots.store import Store
from recess.units import MIB
from recess.volumes import NamedVolumes

SMALL = MachineSpec(memory_bytes=64 * MIB, disk_bytes=64 * MIB)


@dataclass
class Room:
    """Everything a test needs."""

    parts: Parts
    manager: Manager
    host: FakeHost
    driver: FakeDriver
    blobs: MemoryBlobs
    lines: list[str] = field(default_factory=list)

    async def sh(self, ref: str, script: str) -> str:
        """Run a script in a machine; returns its output, fails if it fails."""
        row = await self.manager.get(ref)
        job = await (await self.manager.link(row.id)).exec(ExecRequest(argv=["sh", "-c", script]))
        out = b""
        async for _, data in job.output():
            out += data
        assert await job.wait() == 0, out
        return out.decode()

    @property
    def store(self) -> Store:
        """The snapshot store."""
        assert isinstance(self.parts.store, Store)
        return self.parts.store

    def lose_store(self) -> None:
        """Forget what the store held in memory (pins of writes), as the death of its process does."""
        self.store.close()
        self.parts = replace(self.parts, store=Store(self.store._blobs))

    def fill_disk(self, full: bool) -> None:
        """Let the disk that blobs are on be full, or have room again."""
        self.blobs.capacity_bytes = 0 if full else None

    async def abandon(self) -> None:
        """Stop this server's tasks as SIGKILL does: nothing is said to anybody."""
        for live in self.manager.fleet.all():
            tasks = [
                t
                for t in (live.watcher, live.stall_watcher, live.idle_watcher, live.main.task if live.main else None)
                if t is not None
            ]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if live.forwarder is not None:
                await live.forwarder.stop()

    async def restart(self, *, killed: bool = False) -> dict[str, int]:
        """End this server, properly or as if by SIGKILL, and start the next one; returns what that recovered."""
        if killed:
            await self.abandon()
        else:
            await self.manager.close(detach=True)
        self.driver = FakeDriver(host=self.host, programs=self.driver.programs)
        self.parts = replace(self.parts, driver=self.driver)
        self.manager = Manager(self.parts)
        return await self.manager.recover()


@asynccontextmanager
async def machine_room(
    folder: Path,
    programs: Mapping[str, Program] | None = None,
    *,
    local_blobs: bool = False,
    clock: Clock | None = None,
) -> AsyncIterator[Room]:
    """Open a room below `folder` and close it with everything in it. `local_blobs`: on the disk, not in memory."""
    lines: list[str] = []
    host = FakeHost()
    driver = FakeDriver(host=host, programs=programs)
    blobs = MemoryBlobs()
    store = Store(LocalBlobs(folder / "blobs") if local_blobs else blobs)
    db = Database.open(folder / "recess.db", [SCHEMA])
    parts = Parts(
        driver=driver, store=store, images=FakeImages(), catalog=Catalog(db), clock=clock or SystemClock(),
        machines_dir=folder / "machines", run_dir=folder / "run", progress=lines.append,
        volumes=NamedVolumes(folder / "volumes"),
    )  # fmt: skip
    room = Room(parts, Manager(parts), host, driver, blobs, lines)
    await room.manager.recover()
    try:
        yield room
    finally:
        await room.manager.close(detach=True)
        for vm in list(host.vms.values()):
            await vm.kill()
        await db.close()
        room.store.close()
