"""The guest link of the process harness: a folder for a file system, process groups for a job table."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recess.errors import NotFound, Unsupported
from recess.guestlink.link import ExecRequest, IncomingHandler, Job, JobInfo, Thaw
from recess.ids import new_id
from recess.plain.door import SocketStream, dial_here
from recess.plain.folder import FolderFiles


@dataclass
class _Process:
    process: asyncio.subprocess.Process
    info: JobInfo
    output: list[bytes] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    ended: bool = False
    pump: asyncio.Task[None] | None = None


class ProcessJob:
    """A handle on a process of the harness."""

    def __init__(self, process: _Process) -> None:
        self._process = process
        self.job_id = process.info.job_id
        self.pid = process.info.pid

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield all output from the start."""
        sent = 0
        one = self._process
        while True:
            while sent < len(one.output):
                yield 1, one.output[sent]
                sent += 1
            if one.ended:
                return
            async with one.changed:
                while not one.ended and sent == len(one.output):
                    await one.changed.wait()

    async def write(self, data: bytes) -> None:
        """Not offered."""
        raise Unsupported("the process harness has no stdin")

    async def close_stdin(self) -> None:
        """Nothing to close."""

    async def signal(self, number: int) -> None:
        """Signal the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def resize(self, rows: int, cols: int) -> None:
        """No terminal here."""

    async def wait(self) -> int:
        """Return the exit code, 128+N for a signal."""
        code = await self._process.process.wait()
        return 128 - code if code < 0 else code

    async def detach(self) -> None:
        """Nothing to drop."""


class ProcessLink(FolderFiles):
    """GuestLink over a folder `root` of a machine: guest paths are below it, `session.sock` is beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "root")
        self._folder = folder
        self._jobs: dict[str, _Process] = {}

    def signal_all(self, number: int) -> None:
        """Signal every process group that runs."""
        for one in self._jobs.values():
            if not one.ended:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(one.info.pid, number)

    def outputs(self) -> str:
        """Return what the processes have printed, for a failed test's message."""
        parts = (f"{name} ({one.process.returncode}): {b''.join(one.output)!r}" for name, one in self._jobs.items())
        return "; ".join(parts)

    async def reap(self) -> None:
        """Wait for killed processes."""
        for one in self._jobs.values():
            await one.process.wait()
            if one.pump is not None:
                await one.pump

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Always there."""
        return 0.0

    async def info(self) -> Mapping[str, Any]:
        """Return a little."""
        return {"version": "process", "hostname": self._folder.name}

    async def exec(self, request: ExecRequest) -> Job:
        """Start a process group; a known job id returns that job."""
        job_id = request.job_id or new_id("job")
        if job_id in self._jobs:
            return ProcessJob(self._jobs[job_id])
        argv = [self._map(one) for one in request.argv]
        if argv[0] == "python3":
            argv[0] = sys.executable
        workspace = self.path(request.cwd)
        workspace.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **{name: self._map(value) for name, value in request.env.items()}}
        env["RECESS_SESSION_SOCKET"] = str(self._folder / "session.sock")
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=workspace, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        info = JobInfo(job_id, process.pid, tuple(request.argv), request.label, time.time(), None)
        one = self._jobs[job_id] = _Process(process, info)
        one.pump = asyncio.create_task(self._pump(one))
        return ProcessJob(one)

    def _map(self, value: str) -> str:
        return str(self.path(value)) if value.startswith("/opt/recess/") else value

    async def _pump(self, one: _Process) -> None:
        assert one.process.stdout is not None
        while data := await one.process.stdout.read(65536):
            async with one.changed:
                one.output.append(data)
                one.changed.notify_all()
        await one.process.wait()
        async with one.changed:
            one.ended = True
            one.changed.notify_all()

    async def attach(self, job_id: str) -> Job:
        """Return a job that exists."""
        if job_id not in self._jobs:
            raise NotFound(f"no such job: {job_id}")
        return ProcessJob(self._jobs[job_id])

    async def jobs(self) -> list[JobInfo]:
        """Return the job table."""
        out = []
        for one in self._jobs.values():
            code = one.process.returncode
            info = one.info
            out.append(JobInfo(info.job_id, info.pid, info.argv, info.label, info.started_s, code))
        return out

    async def forget(self, job_id: str) -> None:
        """Drop an ended job."""
        self._jobs.pop(job_id, None)

    async def freeze(self, *, sync: bool = False, timeout_s: float = 2.0) -> None:
        """Stop all processes."""
        self.signal_all(signal.SIGSTOP)

    async def thaw(self, thaw: Thaw, timeout_s: float = 10.0) -> None:
        """Let them run."""
        self.signal_all(signal.SIGCONT)

    async def unfreeze(self) -> None:
        """Let them run."""
        self.signal_all(signal.SIGCONT)

    async def dial(self, port: int | str, host: str = "127.0.0.1") -> SocketStream:
        """Connect to a port, or a socket, of this host."""
        return await dial_here(port, host)

    async def open_door(self, path: str) -> None:
        """The harness has none."""
        raise Unsupported("the process harness opens no doors")

    def serve_incoming(self, handler: IncomingHandler) -> None:
        """The harness routes streams itself."""

    async def stats(self) -> Mapping[str, Any]:
        """Return how many processes the kernel ended for want of memory: as many as the bytes of the file `oom-kills` that
        they left in the machine, since a folder has no kernel of its own."""
        there = self.path("/oom-kills")
        return {"oom_kills": there.stat().st_size if there.exists() else 0}

    async def close(self) -> None:
        """Nothing to cut."""
