"""The host as the story sees it from outside: processes of a run directory, their memory, their end. Linux /proc only.

A VM's processes (VMM and keeper) carry the run directory's path in their command line: that is how they are found,
whatever driver started them. Waiting for their end uses pidfds, so it neither polls nor confuses reused pids.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostProcess:
    """One process. `pss_bytes`: proportional memory, 0 if it may not be read."""

    pid: int
    command: str
    pss_bytes: int


def processes_of(directory: Path, *, but_in: Path | None = None) -> list[HostProcess]:
    """Return the processes whose command line names something below the directory, without those that work below the
    folder `but_in`."""
    needle = os.fsencode(directory) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
            apart = but_in is not None and (entry / "cwd").readlink().is_relative_to(but_in)
        except OSError:
            continue  # it has ended meanwhile, or is another user's
        if needle in line and not apart:
            command = Path(os.fsdecode(line.split(b"\0")[0])).name
            found.append(HostProcess(int(entry.name), command, _pss(entry)))
    return sorted(found, key=lambda one: one.pid)


def _pss(entry: Path) -> int:
    try:
        rollup = (entry / "smaps_rollup").read_text()
    except OSError:
        return 0
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


async def wait_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Wait until all these processes have ended; return those that have not within the time."""
    waiting = {pid: asyncio.create_task(_ended(pid)) for pid in pids}
    if not waiting:
        return []
    await asyncio.wait(waiting.values(), timeout=timeout_s)
    left = [pid for pid, task in waiting.items() if not task.done()]
    for task in waiting.values():
        task.cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)
    return left


async def _ended(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL each; those that are gone already are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
