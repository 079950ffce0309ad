"""A heartbeat inside a machine, heard from outside: the longest silence is the standstill as the workload felt it.

A process in the machine writes a byte every 4 ms; arrival times are taken here, by this host's clock, because the
machine's own clock stands still with it. So the figure includes the guest's freezer, the pause, and some jitter of the
way out: it is an upper bound. The process ends when its input is closed, or by itself after 6 s (in a fork, whose
input nobody closes).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from typing import Self

from recess.errors import GuestFailed, RecessError
from recess.sdk.exec_stream import ExecStream
from recess.sdk.transport import Transport

_PROGRAM = """
import os, select, time
end = time.monotonic() + 6
while time.monotonic() < end:
    os.write(1, b".")
    if select.select([0], [], [], 0.004)[0]:
        break
"""
FIRST_BEAT_S = 30.0


def longest_gap(beats: list[float], start: float, end: float) -> float:
    """Return the longest silence that overlaps start..end, in seconds; the whole span if nothing was heard."""
    inside = [start, *(beat for beat in beats if start < beat < end), end]
    before = [beat for beat in beats if beat <= start]
    after = [beat for beat in beats if beat >= end]
    inside[0] = before[-1] if before else start
    inside[-1] = after[0] if after else end
    return max(b - a for a, b in itertools.pairwise(inside))


class Heartbeat:
    """Async context manager over a machine of a server."""

    def __init__(self, transport: Transport, machine: str) -> None:
        self._transport = transport
        self._machine = machine
        self._stream: ExecStream | None = None
        self._thread: threading.Thread | None = None
        self._loop = asyncio.get_running_loop()
        self._first = asyncio.Event()
        self.beats: list[float] = []

    async def __aenter__(self) -> Self:
        """Start it and wait for the first beat. Raises GuestFailed, IllegalState if the machine is being put away."""
        start = {"argv": ["python3", "-c", _PROGRAM], "stdin": True}
        self._stream = await asyncio.to_thread(ExecStream, self._transport, self._machine, start)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="heartbeat")
        self._thread.start()
        async with asyncio.timeout(FIRST_BEAT_S):
            await self._first.wait()
        if not self.beats:
            await self.__aexit__()
            raise GuestFailed("the heartbeat was cut off before its first beat")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._stream is not None:
            with contextlib.suppress(RecessError, OSError):
                await asyncio.to_thread(self._stream.eof)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, FIRST_BEAT_S)

    def _listen(self) -> None:
        def heard(_number: int, data: bytes) -> None:
            self.beats.extend([time.monotonic()] * len(data))
            self._loop.call_soon_threadsafe(self._first.set)

        if self._stream is not None:
            with contextlib.suppress(RecessError, OSError):
                self._stream.run(heard)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            self._loop.call_soon_threadsafe(self._first.set)
