"""What the driver holds of one running VM, and the small moves that more than one of its procedures need."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.journal import Journal
from recess.drivers.qemu.keeper import Keeper, Obituary, last_words
from recess.drivers.qemu.layout import Layout
from recess.drivers.qemu.linkport import LinkPort
from recess.drivers.qemu.memory import UNTRACKED, Tracking
from recess.drivers.qemu.qmp import Qmp, QmpRefused
from recess.errors import DriverFailed, RecessError
from recess.machines.contract import Fingerprint, LazyMemory

P = ParamSpec("P")
T = TypeVar("T")


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
    tracking: Tracking = UNTRACKED
    memory: str = ""  # how it was brought back, in words
    start: str = ""  # how its process came about, in words
    lazy: LazyMemory | None = None

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
        if self.lazy is not None:
            await self.lazy.close()
        await self.port.close()
        await self.qmp.close()
        self.keeper.close()


def died(what: str, obituary: Obituary) -> DriverFailed:
    """Return the error for a VM that ended while something was done with it."""
    return DriverFailed(f"the VM ended during {what}: {obituary.line()}", log=obituary.log, end=obituary.end)


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread. A cancellation is raised when the thread is through, not before: it may hold
    descriptors that the canceller is about to close, or be starting a process."""
    return await to_the_end(asyncio.get_running_loop().run_in_executor(None, functools.partial(work, *args, **kwargs)))


async def to_the_end(work: Awaitable[T]) -> T:
    """Return the result; a cancellation is raised when the work is through, not before."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()
        raise


async def all_of(*work: Awaitable[Any]) -> list[Any]:
    """Return all results; raise the first error only when all are through, so that nothing goes on behind it."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def unless_dead(keeper: Keeper, what: str, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or raise DriverFailed as soon as the VM is gone."""
    task = asyncio.ensure_future(work)
    try:
        waiting: set[asyncio.Future[Any]] = {task, keeper.death}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise died(what, keeper.death.result())
        error = task.exception()
        if isinstance(error, RecessError) and not isinstance(error, QmpRefused):
            # A VM that ends cuts its channels before the keeper has told; its end is the better reason.
            obituary = await last_words(keeper)
            if obituary is not None:
                raise died(what, obituary) from error
        return task.result()
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
