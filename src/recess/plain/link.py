"""`GuestLink` of a plain machine: its folder and its jobs. Absolute paths in a process's own doings are this host's."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recess.errors import Unsupported
from recess.guestlink.link import ExecRequest, IncomingHandler, JobInfo, Thaw
from recess.ids import new_id
from recess.plain.door import SocketStream, dial_here
from recess.plain.folder import FolderFiles
from recess.plain.jobs import PlainJob, PlainJobs

HOME = "/root"
GUEST_PREFIX = "/opt/recess/"  # what the host puts into a machine; such words in argv and env are translated


class PlainLink(FolderFiles):
    """See the module. `door`: the socket at which the machine's sessions are reached."""

    def __init__(self, folder: Path, door: Path) -> None:
        super().__init__(folder / "root")
        self._door = door
        self.processes = PlainJobs(folder / "jobs")

    async def ping(self, timeout_s: float = 5.0) -> float:
        """It is there."""
        return 0.0

    async def info(self) -> Mapping[str, Any]:
        """Return a little."""
        return {"version": "process", "hostname": socket.gethostname()}

    async def exec(self, request: ExecRequest) -> PlainJob:
        """Start a process group; a known job id is that job. Its environment is what is asked for and no more of the server's
        than a PATH. Raises GuestFailed."""
        if request.tty or request.stdin:
            raise Unsupported("a plain process has no terminal and no stdin", hint="leave out -i and -t")
        job_id = request.job_id or new_id("job")
        argv = [self._here(one) for one in request.argv]
        if argv[0] == "python3":
            argv[0] = sys.executable
        cwd = self.path(request.cwd)
        cwd.mkdir(parents=True, exist_ok=True)
        self.path(HOME).mkdir(parents=True, exist_ok=True)
        env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.path(HOME)), "LANG": "C.UTF-8",
            **{name: self._here(value) for name, value in request.env.items()}, "RECESS_SESSION_SOCKET": str(self._door),
        }  # fmt: skip
        await self.processes.start(
            job_id, argv, env=env, cwd=cwd, label=request.label, shown=list(request.argv), now=time.time()
        )  # fmt: skip
        return await self.attach(job_id)

    def _here(self, value: str) -> str:
        return str(self.path(value)) if value.startswith(GUEST_PREFIX) else value

    async def attach(self, job_id: str) -> PlainJob:
        """Return a job that exists."""
        return PlainJob(self.processes, self.processes.find(job_id))

    async def jobs(self) -> list[JobInfo]:
        """Return the job table."""
        return self.processes.list()

    async def forget(self, job_id: str) -> None:
        """Drop an ended job."""
        self.processes.forget(job_id)

    async def freeze(self, *, sync: bool = False, timeout_s: float = 2.0) -> None:
        """Stop all processes."""
        self.processes.signal(signal.SIGSTOP)

    async def thaw(self, thaw: Thaw, timeout_s: float = 10.0) -> None:
        """Let them run: they share this host's clock, name and random numbers."""
        self.processes.signal(signal.SIGCONT)

    async def unfreeze(self) -> None:
        """Let them run."""
        self.processes.signal(signal.SIGCONT)

    async def dial(self, port: int | str, host: str = "127.0.0.1") -> SocketStream:
        """Connect to a port, or a socket, of this host."""
        return await dial_here(port, host)

    async def open_door(self, path: str) -> None:
        """A plain process uses the host's sockets as it is."""
        raise Unsupported("a plain process has this host's sockets already", hint="leave out --socket")

    def serve_incoming(self, handler: IncomingHandler) -> None:
        """The machine's door is its service's business."""

    async def stats(self) -> Mapping[str, Any]:
        """Return how many processes run."""
        return {"processes": sum(one.exit_code is None for one in self.processes.list())}

    async def close(self) -> None:
        """Nothing to cut."""
