"""The job table of a plain machine: files that the keepers of its processes write, read by whoever serves it now.

Nothing is held in memory that is not in the files, so a restarted server sees the same table. A job whose keeper is gone
without having written a code (killed, the host was restarted) has ended with 137.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recess.errors import BadInput, GuestFailed, IllegalState, NotFound, Unsupported
from recess.guestlink.link import JobInfo
from recess.plain import keeper

START_S = 30.0
LOOK_S = 0.1  # between two looks at a file that another process writes
PIECE_BYTES = 65536
LOST = 137
TAIL_BYTES = 4 << 20
ENDED_KEPT = 64  # of what was run in it; of its agents (those with a label), fewer
LABELLED_KEPT = 8


class PlainJobs:
    """The jobs below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    async def start(
        self, job_id: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, label: str, shown: Sequence[str], now: float
    ) -> None:  # fmt: skip
        """Start a process under a keeper; a job id that is known is that job. Raises GuestFailed if it cannot be run."""
        self._check(job_id)
        if (self._folder / f"{job_id}.pid").exists():
            return
        self._thin_out()
        spec = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "label": label, "shown": list(shown), "now": now}
        keeper.put(str(self._folder / f"{job_id}.json"), json.dumps(spec))
        command = [sys.executable, "-I", "-S", keeper.__file__, str(self._folder), job_id]
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if done.returncode:
            (self._folder / f"{job_id}.json").unlink()
            raise GuestFailed(f"cannot run {argv[0]}: {done.stderr.strip()[-400:]}")

    def list(self) -> list[JobInfo]:
        """Return all jobs, oldest first."""
        found = [self.find(path.stem) for path in self._folder.glob("*.pid")]
        return sorted(found, key=lambda one: one.started_s)

    def find(self, job_id: str) -> JobInfo:
        """Return one. Raises NotFound."""
        self._check(job_id)
        spec, running = self._read(job_id, "json"), self._read(job_id, "pid")
        if not spec or not running:
            raise NotFound(f"no such job: {job_id}")
        return JobInfo(
            job_id,
            int(running["pid"]),
            tuple(spec["shown"]),
            str(spec["label"]),
            float(spec["now"]),
            self._code(job_id, running),
        )

    def _code(self, job_id: str, running: Mapping[str, Any]) -> int | None:
        path = self._folder / f"{job_id}.code"
        for _ in range(2):  # its keeper may write it between our two looks
            with contextlib.suppress(OSError, ValueError):
                return int(path.read_text())
            if keeper.begun(int(running["keeper"])) == running["begun"]:
                return None
        return LOST

    def signal(self, number: int, job_id: str = "") -> None:
        """Signal the process group of a job, or of all that run."""
        for one in [self.find(job_id)] if job_id else self.list():
            if one.exit_code is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(one.pid, number)

    async def ended(self, job_id: str) -> int:
        """Return the exit code when there is one."""
        while (code := self.find(job_id).exit_code) is None:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(LOOK_S)
        return code

    async def end_all(self) -> None:
        """Kill everything that runs and wait for it."""
        self.signal(signal.SIGKILL)
        for one in self.list():
            await self.ended(one.job_id)

    def forget(self, job_id: str) -> None:
        """Drop an ended job. Raises IllegalState for one that runs."""
        if self.find(job_id).exit_code is None:
            raise IllegalState(f"job {job_id} still runs")
        for suffix in ("pid", "json", "out", "code"):
            (self._folder / f"{job_id}.{suffix}").unlink(missing_ok=True)

    async def output(self, job_id: str) -> AsyncIterator[bytes]:
        """Yield all output from the start until the job has ended."""
        with (self._folder / f"{job_id}.out").open("rb") as file:
            while True:
                over = self.find(job_id).exit_code is not None  # before the read: what came until then is in it
                while piece := file.read(PIECE_BYTES):
                    yield piece
                if over:
                    return
                await asyncio.sleep(LOOK_S)

    def tail(self, job_id: str) -> tuple[bytes, int]:
        """Return the newest output of a job, at most TAIL_BYTES, and how much there was in all. Blocking."""
        self._check(job_id)
        try:
            with (self._folder / f"{job_id}.out").open("rb") as file:
                total = file.seek(0, os.SEEK_END)
                file.seek(max(0, total - TAIL_BYTES))
                return file.read(TAIL_BYTES), total
        except FileNotFoundError:
            return b"", 0

    def _thin_out(self) -> None:
        """Forget what was run in it and has ended, but for the newest: nobody else does."""
        ended = [one for one in self.list() if one.exit_code is not None]
        for one in [*[a for a in ended if a.label][:-LABELLED_KEPT], *[a for a in ended if not a.label][:-ENDED_KEPT]]:
            self.forget(one.job_id)

    def set_deadline(self, until_s: float | None) -> None:
        """Let the keepers end everything at this time of the monotonic clock (None: never)."""
        path = self._folder / "deadline"
        if until_s is None:
            path.unlink(missing_ok=True)
        else:
            keeper.put(str(path), f"{until_s:.3f}")

    def _read(self, job_id: str, suffix: str) -> dict[str, Any]:
        try:
            data = json.loads((self._folder / f"{job_id}.{suffix}").read_bytes())
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    @staticmethod
    def _check(job_id: str) -> None:
        if not job_id or "/" in job_id or job_id.startswith("."):
            raise BadInput(f"not a job id: {job_id[:80]!r}")


class PlainJob:
    """A handle on a job."""

    def __init__(self, jobs: PlainJobs, info: JobInfo) -> None:
        self._jobs = jobs
        self.job_id = info.job_id
        self.pid = info.pid

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield all output from the start, both streams as 1."""
        async for piece in self._jobs.output(self.job_id):
            yield 1, piece

    async def write(self, data: bytes) -> None:
        """Not offered: its stdin is closed."""
        raise Unsupported("a plain process has no stdin")

    async def close_stdin(self) -> None:
        """It is closed."""

    async def signal(self, number: int) -> None:
        """Signal its process group."""
        self._jobs.signal(number, self.job_id)

    async def resize(self, rows: int, cols: int) -> None:
        """There is no terminal."""

    async def wait(self) -> int:
        """Return the exit code."""
        return await self._jobs.ended(self.job_id)

    async def detach(self) -> None:
        """Nothing to drop."""
