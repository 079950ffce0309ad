"""The small moves that procedures with a VM are made of: timed steps, threads that are waited for, work that a VM's end cuts short.

It must know no VMM: an answer that is a no comes as `RefusedAlive`, and is the reason itself.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from recess.drivers.kept.keeper import Keeper, Obituary, last_words
from recess.errors import DriverFailed, RecessError

_CONSOLE_BYTES, _WORD_CHARS = 4096, 200
_LAST_WORD = re.compile(r"(?<=guestd: fatal: ).+|Kernel panic - not syncing: .+")

P = ParamSpec("P")
T = TypeVar("T")


class RefusedAlive(DriverFailed):
    """The VMM answered with an error of its own: it lives, and this says why."""

    code = "driver_failed"


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


def died(what: str, obituary: Obituary, word: str = "") -> DriverFailed:
    """Return the error for a VM that ended while something was done with it; `word`: why, by the guest itself."""
    how = f"{word}; {obituary.line()}" if word else obituary.line()
    return DriverFailed(f"the VM ended during {what}: {how}", log=obituary.log, end=obituary.end)


def last_word(console: bytes) -> str:
    """Return why a guest that just booted gave up, as its serial console says: guestd's or the kernel's own line, "" for neither.

    Only its end counts, and it is a stranger's text: one short line of what can be printed.
    """
    for line in reversed(console[-_CONSOLE_BYTES:].decode("ascii", errors="replace").splitlines()):
        found = _LAST_WORD.search(line)
        if found:
            return "".join(c if c.isprintable() else "?" for c in found[0])[:_WORD_CHARS]
    return ""


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


async def unless_dead(
    keeper: Keeper, what: str, work: Coroutine[Any, Any, T], *, console: Callable[[], bytes] = bytes
) -> T:
    """Return the result of `work`, or raise DriverFailed as soon as the VM is gone. `console`: returns the end of what a guest
    said that was booted for this; its last word is told then.

    Whichever way this ends, `work` has ended before: a command that it runs is gone before the caller clears away its files.
    """
    task = asyncio.ensure_future(work)
    try:
        waiting: set[asyncio.Future[Any]] = {task, keeper.death}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise died(what, keeper.death.result(), last_word(console()))
        error = task.exception()
        if isinstance(error, RecessError) and not isinstance(error, RefusedAlive):
            # A VM that ends cuts its channels before the keeper has told; its end is the better reason.
            obituary = await last_words(keeper)
            if obituary is not None:
                raise died(what, obituary, last_word(console())) from error
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
