"""The fake guest: guestd's job table, files, freezer and identity, run by asyncio tasks instead of a kernel.

A process is a *program* (an async function) whose memory is `JobState.memory`; after a restore every live program is
called again with that memory and `resumed=True`, which is how "the very same process goes on" is played here.
It must know nothing of names, sessions or stores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from recess.drivers.fake.files import FileTree
from recess.drivers.fake.state import (
    DiskState,
    JobState,
    MemoryState,
    append_output,
    fresh_disk,
    fresh_memory,
    random_bytes,
    reseed,
)
from recess.drivers.fake.streams import MemoryStream, stream_pair
from recess.errors import BadInput, GuestFailed, NotFound, Refused, Unavailable
from recess.guestlink.link import TOKEN_PATH, ExecRequest, IncomingHandler, Thaw

JOBS_MAX = 256
STDIN_BYTES_MAX = 256 * 1024
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Process:
    """What a program sees of its process. Every await on it stands still while the workload is frozen."""

    def __init__(self, guest: FakeGuest, job: JobState, *, resumed: bool) -> None:
        self.guest = guest
        self.job = job
        self.resumed = resumed
        self.memory: dict[str, Any] = job.memory
        self.traps: dict[int, Callable[[], Awaitable[None]]] = {}

    async def running(self) -> None:
        """Wait until the vCPUs run and the workload is not frozen."""
        await self.guest.gate.wait()

    async def write(self, fd: int, data: bytes) -> None:
        """Write to stdout (1) or stderr (2)."""
        await self.running()
        if data:
            append_output(self.job, 1 if self.job.tty else fd, data)
            self.guest.notify(self.job.job_id)
            await asyncio.sleep(0)

    async def read(self, limit: int = 65536) -> bytes:
        """Read from stdin, b"" at its end."""
        while True:
            await self.running()
            if self.job.stdin:
                out, self.job.stdin = self.job.stdin[:limit], self.job.stdin[limit:]
                self.guest.notify(self.job.job_id)
                return out
            if not self.job.stdin_open:
                return b""
            await self.guest.changed(self.job.job_id)

    async def sleep_until(self, uptime_s: float) -> None:
        """Sleep by the guest's own uptime, which stands still while the vCPUs do."""
        while True:
            await self.running()
            left = uptime_s - self.guest.uptime_s()
            if left <= 0:
                return
            await asyncio.sleep(left)

    def listen(self, port: int | str, handler: Callable[[MemoryStream], Awaitable[None]]) -> None:
        """Serve connections to this port, or to the socket at this path, until the process ends."""
        self.guest.listeners[port] = (self.job.job_id, handler)

    async def connect_out(self, service: str, metadata: Mapping[str, Any]) -> MemoryStream:
        """Open a stream to the host ("proxy", "session"), as guestd's own listeners do."""
        return await self.guest.open_out(service, metadata)


Program = Callable[[Process, list[str]], Awaitable[int]]


class FakeGuest:
    """One guest. `start` begins (or, after a restore, continues) its processes; `stop` is the power cut."""

    def __init__(self, programs: Mapping[str, Program], memory: MemoryState, disk: DiskState) -> None:
        self.programs = programs
        self.memory = memory
        self.disk = disk
        self.files = FileTree(memory, disk, self.wall_s)
        self.gate = asyncio.Event()
        self.listeners: dict[int | str, tuple[str, Callable[[MemoryStream], Awaitable[None]]]] = {}
        self.incoming: IncomingHandler | None = None
        self.streams: set[MemoryStream] = set()
        self.vcpus = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._aside: set[asyncio.Task[None]] = set()
        self._host: set[asyncio.Task[None]] = set()  # the host's handlers: they see a cut stream, not a cancellation
        self._traps: dict[str, Process] = {}
        self._signals: dict[str, asyncio.Event] = {}
        self._since: float | None = None  # host monotonic at which the vCPUs last began to run

    @classmethod
    def booted(cls, programs: Mapping[str, Program], disk: bytes = b"") -> FakeGuest:
        """Return a guest as after a cold boot, clock set; `disk` is what an earlier life wrote there, b"" a blank one.

        Raises msgspec's errors when that is no fake guest's disk.
        """
        memory = fresh_memory()
        memory.wall_offset_s = time.time()
        return cls(programs, memory, msgspec.msgpack.decode(disk, type=DiskState) if disk else fresh_disk())

    @classmethod
    def thawable(cls, programs: Mapping[str, Program], memory: bytes, disk: bytes) -> FakeGuest:
        """Return a guest from the two blobs of a snapshot; raises Corrupt through msgspec's ValidationError."""
        return cls(
            programs, msgspec.msgpack.decode(memory, type=MemoryState), msgspec.msgpack.decode(disk, type=DiskState)
        )

    # --- vCPUs, clock, freezer -------------------------------------------------------------------------------

    def run_vcpus(self) -> None:
        """Let the vCPUs run; processes that exist are continued."""
        if self._since is None:
            self._since = time.monotonic()
        self.vcpus.set()
        self._regate()
        for job in self.memory.jobs.values():
            if job.exit_code is None and job.job_id not in self._tasks:
                self._spawn(job, resumed=True)

    def stop_vcpus(self) -> None:
        """Stand still: uptime is banked, every process waits at its next await."""
        if self._since is not None:
            self.memory.uptime_s += time.monotonic() - self._since
            self._since = None
        self.vcpus.clear()
        self._regate()

    def _regate(self) -> None:
        if self.vcpus.is_set() and not self.memory.frozen:
            self.gate.set()
        else:
            self.gate.clear()

    def uptime_s(self) -> float:
        """Return seconds the vCPUs have run since boot."""
        return self.memory.uptime_s + (time.monotonic() - self._since if self._since is not None else 0.0)

    def wall_s(self) -> float:
        """Return the guest's idea of the wall clock."""
        return self.memory.wall_offset_s + self.uptime_s()

    def freeze(self) -> None:
        """Freeze the workload."""
        self.memory.frozen = True
        self._regate()

    def unfreeze(self) -> None:
        """Let the workload run."""
        self.memory.frozen = False
        self._regate()

    def thaw(self, thaw: Thaw) -> None:
        """Reseed, set clock and identity, unfreeze."""
        if len(thaw.entropy) != 32:
            raise GuestFailed("thaw: entropy must be 32 bytes")
        reseed(self.memory, thaw.entropy)
        self.memory.wall_offset_s = thaw.wall_ns / 1e9 - self.uptime_s()
        self.memory.hostname, self.memory.machine_id = thaw.hostname, thaw.machine_id
        self.memory.generation, self.memory.epoch = thaw.generation, thaw.epoch
        self.memory.env = dict(thaw.env)
        self.files.write("/etc/hostname", thaw.hostname.encode() + b"\n")
        self.files.write("/etc/machine-id", thaw.machine_id.encode() + b"\n")
        self.files.write("/run/recess/generation", thaw.generation.encode() + b"\n")
        self.files.write("/run/recess/epoch", str(thaw.epoch).encode() + b"\n")
        self.files.write("/run/recess/env", "".join(f"{k}={v}\n" for k, v in thaw.env.items()).encode())
        if thaw.token:
            self.files.write(TOKEN_PATH, thaw.token.encode(), 0o444)
        self.unfreeze()

    def random(self, count: int) -> bytes:
        """Return bytes of /dev/urandom."""
        return random_bytes(self.memory, count)

    # --- processes -------------------------------------------------------------------------------------------

    def exec(self, request: ExecRequest) -> JobState:
        """Start a process, or return the job that already has this id. Raises NotFound for an unknown command."""
        if request.job_id and request.job_id in self.memory.jobs:
            return self.memory.jobs[request.job_id]
        if not request.argv:
            raise BadInput("exec: argv is empty")
        name = request.argv[0].rsplit("/", 1)[-1]
        if name not in self.programs:
            raise NotFound(
                f"exec: {request.argv[0]}: command not found", kind="command", ref=request.argv[0], exit_code=127
            )
        if self.files.get(self.files.clean(request.cwd)) is None:
            raise NotFound(f"exec: no such folder: {request.cwd}", kind="file", ref=request.cwd)
        self._make_room()
        job_id = request.job_id or f"j{self.memory.next_job}"
        self.memory.next_job += 1
        self.memory.next_pid += 1
        env = {"PATH": _PATH, "HOME": "/root"} | self.memory.env | dict(request.env)
        job = JobState(
            job_id=job_id, pid=self.memory.next_pid, argv=list(request.argv), env=env, cwd=request.cwd,
            user=request.user, tty=request.tty, label=request.label, started_s=self.wall_s(), stdin_open=request.stdin,
        )  # fmt: skip
        self.memory.jobs[job_id] = job
        self._spawn(job, resumed=False)
        return job

    def _make_room(self) -> None:
        ended = [job_id for job_id, job in self.memory.jobs.items() if job.exit_code is not None]
        if len(self.memory.jobs) >= JOBS_MAX:
            if not ended:
                raise Unavailable(f"exec: {JOBS_MAX} jobs run already")
            del self.memory.jobs[ended[0]]

    def _spawn(self, job: JobState, *, resumed: bool) -> None:
        process = Process(self, job, resumed=resumed)
        self._traps[job.job_id] = process
        self._tasks[job.job_id] = asyncio.create_task(self._run(process), name=f"fake-{job.job_id}")

    async def _run(self, process: Process) -> None:
        job = process.job
        try:
            await process.running()
            code = await self.programs[job.argv[0].rsplit("/", 1)[-1]](process, job.argv)
        except (NotFound, BadInput, Refused) as exc:
            append_output(job, 2, f"{job.argv[0]}: {exc.message}\n".encode())
            code = 1
        await process.running()
        self._end(job, code)

    def _end(self, job: JobState, code: int) -> None:
        if job.exit_code is None:
            job.exit_code = code
        job.stdin, job.stdin_open, job.memory = b"", False, {}
        self._tasks.pop(job.job_id, None)
        self._traps.pop(job.job_id, None)
        for port in [p for p, (owner, _) in self.listeners.items() if owner == job.job_id]:
            del self.listeners[port]
        self.notify(job.job_id)

    def signal(self, job_id: str, number: int) -> None:
        """Deliver a signal: SIGKILL at once, others as soon as the workload runs."""
        job = self.find_job(job_id)
        if job.exit_code is not None:
            return
        if number == 9:
            self._terminate(job, number)
        else:
            self.aside(self._deliver(job, number))

    async def _deliver(self, job: JobState, number: int) -> None:
        await self.gate.wait()
        process = self._traps.get(job.job_id)
        if process is not None and number in process.traps:
            await process.traps[number]()
        elif number != 28:  # SIGWINCH is ignored by default
            self._terminate(job, number)

    def _terminate(self, job: JobState, number: int) -> None:
        task = self._tasks.get(job.job_id)
        self._end(job, 128 + number)
        if task is not None:
            task.cancel()

    def find_job(self, job_id: str) -> JobState:
        """Return a job; raises NotFound."""
        job = self.memory.jobs.get(job_id)
        if job is None:
            raise NotFound(f"no such job: {job_id}", kind="job", ref=job_id)
        return job

    def notify(self, job_id: str) -> None:
        """Wake everybody who waits for a change of this job."""
        self._signals.pop(job_id, asyncio.Event()).set()

    async def changed(self, job_id: str) -> None:
        """Wait for the next change of this job."""
        await self._signals.setdefault(job_id, asyncio.Event()).wait()

    # --- streams ---------------------------------------------------------------------------------------------

    def dial(self, port: int | str) -> MemoryStream:
        """Connect to a listener inside; raises GuestFailed when there is none."""
        if port not in self.listeners:
            raise GuestFailed(f"connection refused: port {port}")
        ours, theirs = stream_pair()
        self.streams.update((ours, theirs))
        self.aside(self.listeners[port][1](theirs))
        return ours

    async def open_out(self, service: str, metadata: Mapping[str, Any]) -> MemoryStream:
        """Open a stream to the host's handler; raises GuestFailed when nobody serves it."""
        await self.gate.wait()
        if self.incoming is None:
            raise GuestFailed(f"nobody serves {service}")
        ours, theirs = stream_pair()
        self.streams.update((ours, theirs))
        self._start(self.incoming(service, metadata, theirs), self._host)
        return ours

    def aside(self, work: Awaitable[None]) -> None:
        """Run a helper task that dies with the guest; a stream that was cut ends it quietly."""
        self._start(work, self._aside)

    @staticmethod
    def _start(work: Awaitable[None], group: set[asyncio.Task[None]]) -> None:
        async def run() -> None:
            try:
                await work
            except GuestFailed:
                return  # the other end went away: what a broken connection looks like

        task = asyncio.create_task(run())
        group.add(task)
        task.add_done_callback(group.discard)

    async def cut_streams(self) -> None:
        """Break every open stream: the link was lost."""
        streams, self.streams = self.streams, set()
        for stream in streams:
            await stream.cut()

    async def stop(self) -> None:
        """Cut the power: every task ends, nothing is written."""
        tasks = [*self._tasks.values(), *self._aside]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        await self.cut_streams()
        for job_id in list(self._signals):
            self.notify(job_id)
