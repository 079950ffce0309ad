"""The agent's process inside the machine: push its code, start it, watch it, end it.

It must never know of turns or of the log. The process outlives the link: a watcher that loses the link attaches again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from recess.errors import GuestFailed, NotFound, RecessError
from recess.guestlink.link import ExecRequest, GuestLink, Job
from recess.sessions.agent_config import AgentConfig
from recess.sessions.code_tar import build, guest_folder, pieces, sdk_files
from recess.sessions.deps import Deps

TAIL_BYTES = 16 * 1024
ATTACH_RETRY_S = 0.1
LABEL = "agent"


@dataclass(frozen=True)
class Ended:
    """An agent process that is gone: `exit_code` is None when its job is not in the guest's table any more."""

    job_id: str
    exit_code: int | None
    tail: str


class AgentJob:
    """At most one agent process of one machine. `on_end` is called once for each process that ends by itself."""

    def __init__(self, deps: Deps, on_end: Callable[[Ended], None]) -> None:
        self._deps = deps
        self._on_end = on_end
        self._machine = ""
        self._watcher: asyncio.Task[None] | None = None
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self.job_id = ""
        self.alive = False

    async def start(self, machine_id: str, job_id: str, *, agent: str, version: str, config: AgentConfig) -> None:
        """Push this version and start it as `job_id` (idempotent by that id)."""
        deps = self._deps
        link = await deps.machines.link(machine_id)
        files = {**await deps.agents.files(agent, version), **sdk_files(deps.settings.agent_package)}
        folder = guest_folder(version)
        await link.put_tar(folder, pieces(build(files)))
        env = {
            **config.env, "PYTHONPATH": folder, "PYTHONUNBUFFERED": "1", "RECESS_AGENT_VERSION": version,
            "RECESS_AGENT_JOB": job_id,
        }  # fmt: skip
        argv = ["python3", "-m", "recess_agent", "run", f"{folder}/{config.entry}"]
        job = await link.exec(ExecRequest(argv=argv, env=env, cwd="/root", job_id=job_id, label=LABEL))
        self._watch(machine_id, job_id, job)

    async def reattach(self, machine_id: str, job_id: str) -> bool:
        """Watch a process that should be there already; tell whether it runs."""
        if not job_id:
            return False
        link = await self._deps.machines.link(machine_id)
        running = [one for one in await link.jobs() if one.job_id == job_id and one.exit_code is None]
        if not running:
            return False
        try:
            job = await link.attach(job_id)
        except NotFound:
            return False
        self._watch(machine_id, job_id, job)
        return True

    async def stop(self, *, term_s: float) -> None:
        """End the watched process: SIGTERM, at most `term_s` of patience, SIGKILL. It is then not reported as ended."""
        job_id, machine_id = self.job_id, self._machine
        await self.forget()
        if job_id:
            await end_job(await self._deps.machines.link(machine_id), job_id, term_s)

    async def forget(self) -> None:
        """Stop watching; the process is left as it is."""
        watcher, self._watcher = self._watcher, None
        self.job_id, self.alive = "", False
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    def tail(self) -> str:
        """Return the end of the process's output."""
        return b"".join(self._tail)[-TAIL_BYTES:].decode("utf-8", "replace")

    def _watch(self, machine_id: str, job_id: str, job: Job) -> None:
        self._machine, self.job_id, self.alive = machine_id, job_id, True
        self._tail.clear()
        self._tail_size = 0
        self._watcher = asyncio.create_task(self._follow(job), name=f"agent-{job_id}")

    async def _follow(self, job: Job | None) -> None:
        while True:
            try:
                if job is None:
                    job = await (await self._deps.machines.link(self._machine)).attach(self.job_id)
                async for _stream, data in job.output():
                    self._keep(data)
                code: int | None = await job.wait()
                break
            except NotFound:
                code = None
                break
            except (RecessError, OSError):
                # The link was cut (a pause, a thaw, a restarted guest channel); the process lives on in the guest. If
                # the machine itself died, its own watcher says so and this one is cancelled.
                job = None
                await self._deps.clock.sleep(ATTACH_RETRY_S)
        self.alive = False
        self._on_end(Ended(self.job_id, code, self.tail()))

    def _keep(self, data: bytes) -> None:
        self._tail.append(data)
        self._tail_size += len(data)
        while self._tail_size > 2 * TAIL_BYTES and len(self._tail) > 1:
            self._tail_size -= len(self._tail.popleft())


async def end_job(link: GuestLink, job_id: str, term_s: float) -> None:
    """End a process of the guest: SIGTERM and at most `term_s`, then SIGKILL. Unknown or ended ones are no error."""
    with contextlib.suppress(NotFound, GuestFailed):
        job = await link.attach(job_id)
        try:
            if term_s > 0:
                await job.signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(job.wait(), term_s)
                    return
            await job.signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.wait(), 5.0)
        finally:
            with contextlib.suppress(RecessError):
                await job.detach()
