"""A heartbeat inside a machine: the longest silence between two beats is the standstill as the workload felt it.

A process beats every 2 ms by the machine's own clock and tells its longest silence when its input is closed. Where
that clock stands still with the machine (QEMU without KVM) the vCPUs' pause is not in the figure and must be added
(the sum is then exact; with a clock that goes on it is an upper bound); the freezer's part is in it. Nothing is sent
while it beats: what travels through the host would measure the host. It ends by itself after 6 s (in a fork, whose
input nobody closes).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Self

from recess.errors import GuestFailed, IllegalState, RecessError
from recess.sdk.exec_stream import ExecStream
from recess.sdk.transport import Transport

_PROGRAM = """
import json, os, select, time
os.write(1, b"up\\n")
last = time.monotonic()
end, longest, beats = last + 6, 0.0, 0
while last < end and not select.select([0], [], [], 0.002)[0]:
    now = time.monotonic()
    longest, last, beats = max(longest, now - last), now, beats + 1
os.write(1, json.dumps({"longest_s": longest, "beats": beats}).encode())
"""
PATIENCE_S = 30.0


def read_result(output: bytes) -> tuple[float, int]:
    """Return the longest silence in seconds and the number of beats. Raises GuestFailed if it did not end well."""
    _, _, told = output.partition(b"\n")
    try:
        data = json.loads(told)
        return float(data["longest_s"]), int(data["beats"])
    except (ValueError, KeyError, TypeError):
        raise GuestFailed(f"the heartbeat was cut off: {told[:80]!r}") from None


class Heartbeat:
    """Async context manager over a machine of a server. After it, `longest_s` and `beats` are known; both are 0 when
    the machine was put away before or meanwhile: then there is no figure."""

    def __init__(self, transport: Transport, machine: str) -> None:
        self._transport = transport
        self._machine = machine
        self._stream: ExecStream | None = None
        self._thread: threading.Thread | None = None
        self._loop = asyncio.get_running_loop()
        self._first = asyncio.Event()
        self._output = b""
        self.longest_s = 0.0
        self.beats = 0

    async def __aenter__(self) -> Self:
        """Start it and wait until it beats, or until it is clear that it will not."""
        start = {"argv": ["python3", "-c", _PROGRAM], "stdin": True}
        with contextlib.suppress(GuestFailed, IllegalState):
            self._stream = await asyncio.to_thread(ExecStream, self._transport, self._machine, start)
            self._thread = threading.Thread(target=self._listen, daemon=True, name="heartbeat")
            self._thread.start()
            async with asyncio.timeout(PATIENCE_S):
                await self._first.wait()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._end()
        if kind is None:
            with contextlib.suppress(GuestFailed):
                self.longest_s, self.beats = read_result(self._output)

    async def _end(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(RecessError, OSError):
                await asyncio.to_thread(self._stream.eof)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, PATIENCE_S)

    def _listen(self) -> None:
        def heard(_number: int, data: bytes) -> None:
            self._output += data
            self._loop.call_soon_threadsafe(self._first.set)

        if self._stream is not None:
            with contextlib.suppress(RecessError, OSError):
                self._stream.run(heard)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            self._loop.call_soon_threadsafe(self._first.set)
