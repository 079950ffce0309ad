"""The guest link of the offline harness: the agent is a task of this very process, everything else is as in the process harness.

So an agent starts in a millisecond, and a test can look into what it patches. What a process would give is not there: the agent
shares the interpreter's modules and environment, and its death is a cancelled task (a tool that runs in a thread runs on).
`Borrowed` keeps what of the interpreter is changed meanwhile, and puts it back. It must know nothing of sessions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from recess.errors import Unsupported
from recess.guestlink.link import ExecRequest, Job, JobInfo
from recess.ids import new_id
from recess.testing.session_link import ProcessLink

KILLED = 128 + signal.SIGKILL
RECONNECT_S = 0.01  # the SDK's longest pause between two tries to reach its host: nothing here is far away


def sdk(package: Path) -> Callable[[str], Any]:
    """Return an importer of the SDK's modules: the installed one, else the one in the folder `package`."""

    def module(name: str) -> ModuleType:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            sys.path.insert(0, str(package))
            return import_module(name)

    return module


class Borrowed:
    """This process's environment, working folder, import path and modules, as they were; `give_back` restores them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._environ = dict(os.environ)
        self._cwd = Path.cwd()
        self._path = list(sys.path)

    def forget_modules(self) -> None:
        """Drop the modules that were loaded from below `root`: the next start of an agent loads them afresh."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and Path(file).is_relative_to(self._root):
                del sys.modules[name]

    def give_back(self) -> None:
        """Put everything back."""
        self.forget_modules()
        os.environ.clear()
        os.environ.update(self._environ)
        os.chdir(self._cwd)
        sys.path[:] = self._path


class TaskJob:
    """A handle on an agent's task."""

    def __init__(self, job_id: str, task: asyncio.Task[int]) -> None:
        self.job_id = job_id
        self.pid = os.getpid()
        self.task = task
        self.started_s = time.time()
        self.killed = False

    def code(self) -> int | None:
        """Return the exit code, None while it runs."""
        if not self.task.done():
            return None
        return (
            KILLED if self.killed or self.task.cancelled() or self.task.exception() is not None else self.task.result()
        )

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield nothing: what the agent prints goes where the test's own output goes. Ends with the agent."""
        await asyncio.wait({self.task})
        return
        yield (1, b"")

    async def write(self, data: bytes) -> None:
        """Not offered."""
        raise Unsupported("an agent in the offline harness has no stdin")

    async def close_stdin(self) -> None:
        """Nothing to close."""

    async def signal(self, number: int) -> None:
        """End it: whatever the signal, it is cancelled. Stopping and going on are no-ops."""
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL) and not self.task.done():
            self.killed = number == signal.SIGKILL
            self.task.cancel()

    async def resize(self, rows: int, cols: int) -> None:
        """No terminal here."""

    async def wait(self) -> int:
        """Return the exit code."""
        await asyncio.wait({self.task})
        return self.code() or 0

    async def detach(self) -> None:
        """Nothing to drop."""


class TaskLink(ProcessLink):
    """See the module. Programs that are not the agent run as processes of this host."""

    def __init__(self, folder: Path, borrowed: Borrowed, load: Callable[[str], Any]) -> None:
        super().__init__(folder)
        self._borrowed = borrowed
        self._load = load
        self._tasks: dict[str, tuple[TaskJob, ExecRequest]] = {}

    def signal_all(self, number: int) -> None:
        """Signal every process, and end the agent's task if that is what is meant."""
        super().signal_all(number)
        if number == signal.SIGKILL:
            for job, _request in self._tasks.values():
                if not job.task.done():
                    job.killed = True
                    job.task.cancel()

    def outputs(self) -> str:
        """Return how the agents ended, for a failed test's message."""
        ended = (f"{name}: {job.code()}" for name, (job, _) in self._tasks.items())
        return "; ".join([super().outputs(), *ended])

    async def reap(self) -> None:
        """Wait for what was ended."""
        await super().reap()
        await asyncio.gather(*(job.task for job, _ in self._tasks.values()), return_exceptions=True)

    async def exec(self, request: ExecRequest) -> Job:
        """Start an agent as a task, anything else as a process; a known job id is that job."""
        job_id = request.job_id or new_id("job")
        if job_id in self._tasks:
            return self._tasks[job_id][0]
        if list(request.argv[:4]) != ["python3", "-m", "recess_agent", "run"]:
            return await super().exec(request)
        workspace = self.path(request.cwd)
        workspace.mkdir(parents=True, exist_ok=True)
        env = {**request.env, "RECESS_SESSION_SOCKET": str(self._folder / "session.sock")}
        env.pop("PYTHONPATH", None)
        code = str(self.path(request.argv[4]))
        task = asyncio.create_task(self._run(code, env, workspace), name=f"agent-{job_id}")
        job = TaskJob(job_id, task)
        self._tasks[job_id] = (job, request)
        return job

    async def _run(self, code: str, env: dict[str, str], workspace: Path) -> int:
        self._borrowed.forget_modules()
        os.environ.update(env)
        os.chdir(workspace)
        runner, wire = self._load("recess_agent.runner"), self._load("recess_agent.wire")
        wire.RETRY_LAST_S = RECONNECT_S
        # Up to its first wait `run` reads the environment and loads the agent: no other agent's start comes in between.
        return int(await runner.run(code))

    async def attach(self, job_id: str) -> Job:
        """Return a job that exists."""
        if job_id in self._tasks:
            return self._tasks[job_id][0]
        return await super().attach(job_id)

    async def jobs(self) -> list[JobInfo]:
        """Return the job table."""
        mine = [
            JobInfo(name, job.pid, tuple(request.argv), request.label, job.started_s, job.code())
            for name, (job, request) in self._tasks.items()
        ]
        return [*mine, *await super().jobs()]

    async def forget(self, job_id: str) -> None:
        """Drop an ended job."""
        if self._tasks.pop(job_id, None) is None:
            await super().forget(job_id)
