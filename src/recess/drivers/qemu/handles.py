"""What the driver holds of one running VM, and the small moves that more than one of its procedures need."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.journal import Journal
from recess.drivers.qemu.keeper import Keeper, Obituary, read_pids
from recess.drivers.qemu.layout import Layout
from recess.drivers.qemu.linkport import LinkPort
from recess.drivers.qemu.qmp import Qmp, QmpRefused
from recess.errors import DriverFailed
from recess.machines.contract import Fingerprint

T = TypeVar("T")

_LAST_WORDS_S = 3.0
_END_S = 5.0


class Steps:
    """Durations of the steps of one procedure, in seconds, by name."""

    def __init__(self) -> None:
        self.timings_s: dict[str, float] = {}
        self.started = self._last = time.monotonic()

    def mark(self, name: str) -> None:
        """Name the time since the last mark."""
        now = time.monotonic()
        self.timings_s[name], self._last = now - self._last, now

    def total(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.started


@dataclass
class Handles:
    """One VM: where its files are, how to talk to its keeper, monitor and guest."""

    layout: Layout
    journal: Journal
    host: HostFacts
    fingerprint: Fingerprint
    port: LinkPort
    keeper: Keeper
    qmp: Qmp
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def explain(self, what: str) -> AsyncIterator[None]:
        """Turn a lost connection inside the block into DriverFailed with how the VM ended and its last words."""
        try:
            yield
        except QmpRefused:
            raise
        except DriverFailed as exc:
            obituary = await last_words(self.keeper)
            if obituary is None:
                raise
            raise died(what, obituary) from exc

    async def running(self) -> bool:
        """Tell whether the vCPUs run."""
        return bool((await self.qmp.execute("query-status"))["running"])

    async def close(self) -> None:
        """Drop every connection; the VM goes on."""
        await self.port.close()
        await self.qmp.close()
        self.keeper.close()


def died(what: str, obituary: Obituary) -> DriverFailed:
    """Return the error for a VM that ended while something was done with it."""
    return DriverFailed(f"the VM ended during {what}: {obituary.line()}", log=obituary.log, end=obituary.end)


async def last_words(keeper: Keeper) -> Obituary | None:
    """Return how the VM ended if it did so now or within a moment, else None."""
    await asyncio.wait([keeper.death], timeout=_LAST_WORDS_S)
    if keeper.death.done() and keeper.death.exception() is None:
        return keeper.death.result()
    return None


async def unless_dead(keeper: Keeper, what: str, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or raise DriverFailed as soon as the VM is gone."""
    task = asyncio.ensure_future(work)
    try:
        waiting: set[asyncio.Future[Any]] = {task, keeper.death}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise died(what, keeper.death.result())
    finally:
        task.cancel()


@contextlib.asynccontextmanager
async def passed_file(qmp: Qmp, fd: int) -> AsyncIterator[str]:
    """Hand QEMU a descriptor and yield a file name for it, valid for commands inside the block."""
    number = (await qmp.execute("add-fd", fd=fd))["fdset-id"]
    try:
        yield f"/dev/fdset/{number}"
    finally:
        with contextlib.suppress(DriverFailed):
            await qmp.execute("remove-fd", {"fdset-id": number})


async def end_vm(layout: Layout, keeper: Keeper | None) -> None:
    """End keeper and VMM, whichever still lives, and remove the run folder. Never fails, bounded in time."""
    pids = read_pids(layout)
    if keeper is not None and not keeper.gone.done():
        with contextlib.suppress(Exception):
            await keeper.kill()
            await asyncio.wait([keeper.gone], timeout=_END_S)
    for name in ("keeper", "vmm"):  # should the keeper hang: with it the kernel ends the VMM
        process = pids.get(name)
        if process is not None and process.alive():
            process.kill()
            await wait_gone(process.pid, _END_S)
    layout.remove_run()


async def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until this process is gone (it need not be a child); False if it is still there."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return True
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(fd, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
        os.close(fd)
