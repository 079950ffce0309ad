"""A machine's main process: started as job "main", its output copied to the host, its end reported once.

The job lives in the guest and is found again after a restore or a restart of the server. It must know nothing of
machine states: what an end means is the manager's decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from recess.errors import NotFound, OutOfSpace, RecessError
from recess.guestlink.link import ExecRequest, GuestLink, Job
from recess.machines.outputlog import OutputLog
from recess.machines.service import MachineSpec

JOB_ID = "main"

OnExit = Callable[[int], Awaitable[None]]


class MainJob:
    """The host's side of job "main" over one link; made anew for every link."""

    def __init__(self, log: OutputLog, on_exit: OnExit, wall_s: Callable[[], float]) -> None:
        self._log = log
        self._wall_s = wall_s
        self._on_exit = on_exit
        self.task: asyncio.Task[None] | None = None
        self._job: Job | None = None

    async def start(self, link: GuestLink, spec: MachineSpec) -> None:
        """Start the process. Raises NotFound when there is no such command, GuestFailed."""
        request = ExecRequest(
            argv=list(spec.argv), env=dict(spec.env), cwd=spec.cwd, user=spec.user, tty=spec.tty, stdin=spec.stdin,
            job_id=JOB_ID, label="main",
        )  # fmt: skip
        job = await link.exec(request)
        with suppress(OutOfSpace):
            self._log.new_run()
        self._follow(job, {1: 0, 2: 0})

    async def attach(self, link: GuestLink, skip: Mapping[int, int]) -> bool:
        """Find the process again; False when the machine has none. `skip`: bytes per stream that are logged already."""
        try:
            job = await link.attach(JOB_ID)
        except NotFound:
            return False
        self._follow(job, dict(skip))
        return True

    @property
    def job(self) -> Job | None:
        """The attached job."""
        return self._job

    def _follow(self, job: Job, skip: dict[int, int]) -> None:
        self._job = job
        self.task = asyncio.create_task(self._pump(job, skip), name="main-job")

    async def _pump(self, job: Job, skip: dict[int, int]) -> None:
        try:
            await self._copy(job, skip)
            code = await job.wait()
        except RecessError:
            return  # the link is gone: the VM ended, or the next link's MainJob goes on
        await self._on_exit(code)

    async def _copy(self, job: Job, skip: dict[int, int]) -> None:
        full = False
        async for stream, data in job.output():
            if stream not in (1, 2):
                skip = {1: 0, 2: 0}  # the ring has lost its beginning: better a repetition than a gap
                continue
            dropped = min(skip[stream], len(data))
            skip[stream] -= dropped
            if dropped < len(data) and not full:
                try:
                    self._log.append(stream, data[dropped:], round(self._wall_s() * 1e9))
                except OutOfSpace:
                    full = True  # the log stops, the machine does not

    async def stop(self) -> None:
        """Stop copying; the process goes on."""
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
