"""The guest link of a fake VM: the same calls, the same errors, no wire.

A link that is closed, or whose VM is stopped, fails as the real one does: GuestFailed, or Timeout when nobody answers.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recess.drivers.fake.guest import STDIN_BYTES_MAX, FakeGuest
from recess.drivers.fake.state import JobState
from recess.errors import BadInput, GuestFailed, IllegalState, Timeout
from recess.guestlink.link import ByteStream, ExecRequest, FileStat, IncomingHandler, JobInfo, Thaw

ANSWER_S = 5.0
ARCHIVE_BYTES_MAX = 256 << 20


class FakeJob:
    """Streams of one job; a handle sees everything that is still in the ring."""

    def __init__(self, link: FakeLink, job: JobState) -> None:
        self._link = link
        self._guest = link.guest
        self._job = job
        self._next = 0
        self.job_id = job.job_id
        self.pid = job.pid

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (fd, bytes) until the process ended and all is read; (0, b"") where older output was dropped."""
        job = self._job
        while True:
            self._link.check()
            if self._next < job.ring_start:
                self._next = job.ring_start
                yield 0, b""
            while self._next < job.ring_start + len(job.ring):
                chunk = job.ring[self._next - job.ring_start]
                self._next += 1
                yield chunk
                self._link.check()
            if job.exit_code is not None:
                return
            await self._guest.changed(job.job_id)

    async def write(self, data: bytes) -> None:
        """Send to stdin, waiting while STDIN_BYTES_MAX are unread."""
        while True:
            self._link.check()
            if not self._job.stdin_open:
                raise GuestFailed(f"job {self.job_id}: stdin is closed")
            if len(self._job.stdin) + len(data) <= STDIN_BYTES_MAX or not self._job.stdin:
                break
            await self._guest.changed(self.job_id)
        self._job.stdin += data
        self._guest.notify(self.job_id)

    async def close_stdin(self) -> None:
        """Send end of file."""
        self._link.check()
        self._job.stdin_open = False
        self._guest.notify(self.job_id)

    async def signal(self, number: int) -> None:
        """Send a signal."""
        await self._link.answer()
        self._guest.signal(self.job_id, number)

    async def resize(self, rows: int, cols: int) -> None:
        """Note a pty's size."""
        await self._link.answer()
        self._job.env.update(LINES=str(rows), COLUMNS=str(cols))

    async def wait(self) -> int:
        """Return the exit code."""
        while self._job.exit_code is None:
            self._link.check()
            await self._guest.changed(self.job_id)
        return self._job.exit_code

    async def detach(self) -> None:
        """Drop the streams; the process goes on."""


class FakeLink:
    """Fulfils `GuestLink` over a FakeGuest. `mute` makes guestd silent, as a stuck guest is."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.mute = False
        self.closed = ""

    def check(self) -> None:
        """Raise GuestFailed when the link was cut."""
        if self.closed:
            raise GuestFailed(f"the guest link is closed: {self.closed}")

    async def answer(self, timeout_s: float = ANSWER_S) -> None:
        """Wait until guestd would answer: the vCPUs run, nobody muted it."""
        self.check()
        try:
            async with asyncio.timeout(timeout_s):
                if self.mute:
                    await asyncio.Event().wait()
                await self.guest.vcpus.wait()
        except TimeoutError as exc:
            raise Timeout(f"guestd did not answer within {timeout_s:g} s") from exc
        self.check()

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Return the round trip in seconds."""
        start = asyncio.get_running_loop().time()
        await self.answer(timeout_s)
        return asyncio.get_running_loop().time() - start

    async def info(self) -> Mapping[str, Any]:
        """Return what guestd says of itself."""
        await self.answer()
        memory = self.guest.memory
        return {
            "version": "fake", "boot_id": memory.boot_id, "uptime_s": self.guest.uptime_s(), "frozen": memory.frozen,
            "hostname": memory.hostname, "generation": memory.generation, "epoch": memory.epoch,
        }  # fmt: skip

    async def exec(self, request: ExecRequest) -> FakeJob:
        """Start a process."""
        await self.answer()
        return FakeJob(self, self.guest.exec(request))

    async def attach(self, job_id: str) -> FakeJob:
        """Attach to a job."""
        await self.answer()
        return FakeJob(self, self.guest.find_job(job_id))

    async def jobs(self) -> list[JobInfo]:
        """Return the job table."""
        await self.answer()
        return [
            JobInfo(j.job_id, j.pid, tuple(j.argv), j.label, j.started_s, j.exit_code)
            for j in self.guest.memory.jobs.values()
        ]

    async def forget(self, job_id: str) -> None:
        """Drop an ended job."""
        await self.answer()
        if self.guest.find_job(job_id).exit_code is None:
            raise IllegalState(f"job {job_id} still runs")
        del self.guest.memory.jobs[job_id]

    async def freeze(self, *, sync: bool = False, timeout_s: float = 2.0) -> None:
        """Freeze the workload."""
        await self.answer(timeout_s)
        self.guest.freeze()

    async def thaw(self, thaw: Thaw, timeout_s: float = 10.0) -> None:
        """Reseed, set clock and identity, unfreeze."""
        await self.answer(timeout_s)
        self.guest.thaw(thaw)

    async def unfreeze(self) -> None:
        """Let the workload run."""
        await self.answer()
        self.guest.unfreeze()

    async def dial(self, port: int | str, host: str = "127.0.0.1") -> ByteStream:
        """Connect to a listener in the guest."""
        await self.answer()
        return self.guest.dial(port)

    async def open_door(self, path: str) -> None:
        """Let programs knock at this path, as long as the file is there."""
        await self.answer()
        self.guest.files.write(self.guest.files.clean(path), b"", 0o666)

    def serve_incoming(self, handler: IncomingHandler) -> None:
        """Set the handler for streams the guest opens."""
        self.guest.incoming = handler

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a whole file."""
        await self.answer()
        files, path, _ = self.guest.files.meant(path)
        files.write(path, data, mode)

    async def read_file(self, path: str, limit: int = 64 << 20) -> bytes:
        """Return a whole file."""
        await self.answer()
        files, path, _ = self.guest.files.meant(path)
        data = files.read(path)
        if len(data) > limit:
            raise BadInput(f"{path} is larger than {limit} bytes")
        return data

    async def stat(self, path: str) -> FileStat:
        """Return what is there."""
        await self.answer()
        files, place, _ = self.guest.files.meant(path)
        return replace(files.stat(place), path=files.clean(path))

    async def list_dir(self, path: str) -> list[FileStat]:
        """Return a folder's entries."""
        await self.answer()
        files, place, behind = self.guest.files.meant(path)
        rows = files.list_dir(place)
        return (
            [replace(row, path=f"{files.clean(path)}/{posixpath.basename(row.path)}") for row in rows]
            if behind
            else rows
        )

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder."""
        await self.answer()
        files, path, _ = self.guest.files.meant(path)
        files.remove(path, recursive=recursive)

    async def get_tar(
        self, path: str, *, name: str = "", follow: bool = False, sparse: bool = False, skip: Sequence[str] = ()
    ) -> AsyncGenerator[bytes, None]:
        """Yield a tar of a file or folder; nothing here has holes."""
        await self.answer()
        files, path, _ = self.guest.files.meant(path)
        yield files.pack(path, name, follow=follow, skip=skip)

    async def put_tar(self, path: str, archive: AsyncIterator[bytes], *, sparse: bool = False) -> None:
        """Unpack a tar stream."""
        data = bytearray()
        async for chunk in archive:
            data += chunk
            if len(data) > ARCHIVE_BYTES_MAX:
                raise BadInput(f"archive is larger than {ARCHIVE_BYTES_MAX} bytes")
        await self.answer()
        files, path, _ = self.guest.files.meant(path)
        files.unpack(path, bytes(data))

    async def seal(self, path: str) -> str:
        """Make a place read-only for the workload."""
        await self.answer()
        return self.guest.files.seal(self.guest.files.clean(path))

    async def unseal(self, path: str) -> None:
        """Undo it."""
        await self.answer()
        self.guest.files.unseal(self.guest.files.clean(path))

    async def stats(self) -> Mapping[str, Any]:
        """Return a few numbers."""
        await self.answer()
        alive = sum(1 for j in self.guest.memory.jobs.values() if j.exit_code is None)
        return {"uptime_s": self.guest.uptime_s(), "processes": alive, "load": [0.0, 0.0, 0.0]}

    async def close(self) -> None:
        """Cut the channel from the host side."""
        await self.cut("closed by the host")

    async def cut(self, reason: str) -> None:
        """Break the link: streams end, waiting readers fail."""
        if not self.closed:
            self.closed = reason
            self.guest.incoming = None
            await self.guest.cut_streams()
            for job_id in list(self.guest.memory.jobs):
                self.guest.notify(job_id)
