"""A guest's process table, read from its /proc by file reads alone: needs no program in the image (`recess top`).

Everything that comes from the guest is bounded and may be nonsense: such a row is left out.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from recess.errors import BadInput, NotFound, RecessError
from recess.guestlink.link import GuestLink

PROCESSES_MAX = 2000
_PROC_BYTES = 64 * 1024
_AT_ONCE = 16
_TICKS = 100  # of every Linux on x86-64: USER_HZ


@dataclass(frozen=True)
class Process:
    """One process of a guest. `cpu_s` since its start, `rss_bytes` resident; `command` with its arguments."""

    pid: int
    ppid: int
    uid: int
    state: str
    cpu_s: float
    rss_bytes: int
    command: str


def parse(pid: int, stat: bytes, status: bytes, cmdline: bytes) -> Process | None:
    """Return a process from three files of /proc/PID (proc(5)); None for a kernel thread or what cannot be read."""
    head, bracket, tail = stat.rpartition(b")")
    fields = tail.split()
    try:
        if not bracket:
            return None
        ppid, cpu = int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS
        rss = int(fields[21]) * 4096
        uid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith(b"Uid:"))
    except (IndexError, ValueError, StopIteration):
        return None
    words = [word.decode(errors="replace") for word in cmdline.split(b"\0") if word]
    name = head.partition(b"(")[2].decode(errors="replace")
    state = fields[0].decode(errors="replace")
    if not words and state != "Z":
        return None
    return Process(pid, ppid, uid, state, cpu, rss, " ".join(words) or f"[{name}]")


async def list_processes(link: GuestLink) -> list[Process]:
    """Return the guest's processes by pid; without a /proc, its running jobs. Raises GuestFailed, Timeout."""
    room = asyncio.Semaphore(_AT_ONCE)
    try:
        names = [one.path.rpartition("/")[2] for one in await link.list_dir("/proc")]
    except (NotFound, BadInput):
        names = []
    pids = sorted(int(name) for name in names if name.isascii() and name.isdigit())[:PROCESSES_MAX]
    if not pids:
        return [
            Process(job.pid, 0, 0, "?", 0.0, 0, " ".join(job.argv))
            for job in await link.jobs()
            if job.exit_code is None
        ]

    async def one(pid: int) -> Process | None:
        async with room:
            try:
                texts = [await link.read_file(f"/proc/{pid}/{name}", _PROC_BYTES) for name in _FILES]
            except RecessError:
                return None  # it has ended meanwhile
        return parse(pid, texts[0], texts[1], texts[2])

    return [process for process in await asyncio.gather(*map(one, pids)) if process is not None]


_FILES = ("stat", "status", "cmdline")
