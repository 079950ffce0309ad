"""`AsyncMachine`: `Machine` for asyncio. Every call is the blocking one, in a thread of this module's own pool.

Threads and not sockets of the loop's: one transport, one behaviour, and nothing here can differ from `Machine`. What waits
is cheap (a thread a running call, at most 256). A call that is cancelled is not undone: what was asked for goes on, as
with a client that went away; a cancelled `exec` leaves its process to `jobs` and `attach`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from recess.sdk.client import Client
from recess.sdk.machine import Machine, Ports, Resumed, Snapshot
from recess.sdk.machine_files import Change, FileInfo, Files, Watch
from recess.sdk.processes import OnBytes, Process, Result
from recess.sdk.transport import Json

CALLS_MAX = 256

P = ParamSpec("P")
T = TypeVar("T")
_threads = ThreadPoolExecutor(CALLS_MAX, thread_name_prefix="recess-call")  # makes none before the first call


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call in the pool."""
    return await asyncio.get_running_loop().run_in_executor(_threads, partial(function, *args, **kwargs))


class AsyncFiles:
    """`Files` for asyncio."""

    def __init__(self, files: Files) -> None:
        self._files = files

    async def read(self, path: str) -> bytes:
        """See `Files.read`."""
        return await in_thread(self._files.read, path)

    async def read_text(self, path: str) -> str:
        """See `Files.read_text`."""
        return await in_thread(self._files.read_text, path)

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """See `Files.write`."""
        await in_thread(self._files.write, path, data, mode=mode)

    async def stat(self, path: str) -> FileInfo:
        """See `Files.stat`."""
        return await in_thread(self._files.stat, path)

    async def exists(self, path: str) -> bool:
        """See `Files.exists`."""
        return await in_thread(self._files.exists, path)

    async def list(self, path: str, *, depth: int = 1) -> list[FileInfo]:
        """See `Files.list`."""
        return await in_thread(self._files.list, path, depth=depth)

    async def make_dir(self, path: str) -> None:
        """See `Files.make_dir`."""
        await in_thread(self._files.make_dir, path)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """See `Files.remove`."""
        await in_thread(self._files.remove, path, recursive=recursive)

    async def watch(self, path: str, *, depth: int = 1) -> AsyncWatch:
        """See `Files.watch`."""
        return AsyncWatch(await in_thread(self._files.watch, path, depth=depth))


class AsyncWatch:
    """`Watch` for asyncio."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def changes(self) -> list[Change]:
        """See `Watch.changes`."""
        return await in_thread(self._watch.changes)


class AsyncProcess:
    """`Process` for asyncio."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.job_id = process.job_id
        self.pid = process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, None before its end was read."""
        return self._process.exit_code

    async def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (stream, bytes) until the process ends."""
        pieces = iter(self._process)
        while (piece := await in_thread(next, pieces, None)) is not None:
            yield piece

    async def wait(
        self, timeout_s: float | None = None, *, on_stdout: OnBytes | None = None, on_stderr: OnBytes | None = None
    ) -> Result:
        """See `Process.wait`; the callbacks run in this loop, in order."""
        tell = partial(_in_loop, asyncio.get_running_loop())
        return await in_thread(self._process.wait, timeout_s, on_stdout=tell(on_stdout), on_stderr=tell(on_stderr))

    async def write(self, data: bytes | str) -> None:
        """See `Process.write`."""
        await in_thread(self._process.write, data)

    async def close_stdin(self) -> None:
        """See `Process.close_stdin`."""
        await in_thread(self._process.close_stdin)

    async def signal(self, number: int) -> None:
        """See `Process.signal`."""
        await in_thread(self._process.signal, number)

    async def kill(self) -> None:
        """See `Process.kill`."""
        await in_thread(self._process.kill)

    async def detach(self) -> None:
        """See `Process.detach`."""
        await in_thread(self._process.detach)


def _in_loop(loop: asyncio.AbstractEventLoop, told: OnBytes | None) -> OnBytes | None:
    return None if told is None else lambda data: _call_in(loop, told, data)


def _call_in(loop: asyncio.AbstractEventLoop, told: OnBytes, data: bytes) -> None:
    loop.call_soon_threadsafe(told, data)


class AsyncMachine:
    """`Machine` for asyncio; `sync` is the blocking one."""

    def __init__(self, machine: Machine) -> None:
        self.sync = machine
        self.id = machine.id

    @classmethod
    async def run(
        cls, image: str = "base", *, ports: Ports = (), client: Client | None = None, **spec: Any
    ) -> AsyncMachine:
        """See `Machine.run`."""
        return cls(await in_thread(Machine.run, image, ports=ports, client=client, **spec))

    @classmethod
    async def get(cls, ref: str, *, client: Client | None = None) -> AsyncMachine:
        """See `Machine.get`."""
        return cls(await in_thread(Machine.get, ref, client=client))

    @classmethod
    async def of_token(cls, token: str, *, client: Client | None = None) -> AsyncMachine:
        """See `Machine.of_token`."""
        return cls(await in_thread(Machine.of_token, token, client=client))

    @classmethod
    async def list(cls, *, everything: bool = False, client: Client | None = None) -> list[AsyncMachine]:
        """See `Machine.list`."""
        return [cls(one) for one in await in_thread(Machine.list, everything=everything, client=client)]

    @classmethod
    async def restore(
        cls, snapshot: str, *, name: str = "", disk: bool = False, client: Client | None = None
    ) -> AsyncMachine:
        """See `Machine.restore`."""
        return cls(await in_thread(Machine.restore, snapshot, name=name, disk=disk, client=client))

    @property
    def resumed(self) -> Resumed | None:
        """How it came back, if it did."""
        return self.sync.resumed

    @property
    def files(self) -> AsyncFiles:
        """Its files."""
        return AsyncFiles(self.sync.files)

    async def info(self) -> Json:
        """See `Machine.info`."""
        return await in_thread(self.sync.info)

    async def port(self, guest: int) -> tuple[str, int]:
        """See `Machine.port`."""
        return await in_thread(self.sync.port, guest)

    async def start(
        self, command: str | Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "",
        user: str = "", tty: bool = False, stdin: bool = False, label: str = "",
    ) -> AsyncProcess:  # fmt: skip
        """See `Machine.start`."""
        return AsyncProcess(
            await in_thread(
                self.sync.start, command, env=env, cwd=cwd, user=user, tty=tty, stdin=stdin, label=label
            )
        )  # fmt: skip

    async def attach(self, job_id: str) -> AsyncProcess:
        """See `Machine.attach`."""
        return AsyncProcess(await in_thread(self.sync.attach, job_id))

    async def exec(
        self, command: str | Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "",
        user: str = "", stdin: bytes | str | None = None, timeout_s: float | None = None,
        on_stdout: OnBytes | None = None, on_stderr: OnBytes | None = None,
    ) -> Result:  # fmt: skip
        """See `Machine.exec`; the callbacks run in this loop, in order."""
        tell = partial(_in_loop, asyncio.get_running_loop())
        return await in_thread(
            self.sync.exec, command, env=env, cwd=cwd, user=user, stdin=stdin, timeout_s=timeout_s,
            on_stdout=tell(on_stdout), on_stderr=tell(on_stderr),
        )  # fmt: skip

    async def jobs(self) -> Sequence[Json]:
        """See `Machine.jobs`."""
        return await in_thread(self.sync.jobs)

    async def pause(self) -> None:
        """See `Machine.pause`."""
        await in_thread(self.sync.pause)

    async def unpause(self) -> None:
        """See `Machine.unpause`."""
        await in_thread(self.sync.unpause)

    async def sync_volumes(self) -> Sequence[Json]:
        """See `Machine.sync_volumes`."""
        return await in_thread(self.sync.sync_volumes)

    async def suspend(self) -> Snapshot:
        """See `Machine.suspend`."""
        return await in_thread(self.sync.suspend)

    async def resume(self, *, disk: bool = False) -> Resumed:
        """See `Machine.resume`."""
        return await in_thread(self.sync.resume, disk=disk)

    async def snapshot(self, name: str = "", *, ttl_s: float | None = None) -> Snapshot:
        """See `Machine.snapshot`."""
        return await in_thread(self.sync.snapshot, name, ttl_s=ttl_s)

    async def fork(self, count: int = 1, *, names: Sequence[str] = ()) -> Sequence[AsyncMachine]:
        """See `Machine.fork`."""
        return [AsyncMachine(one) for one in await in_thread(self.sync.fork, count, names=names)]

    async def stop(self, *, timeout_s: float = 10.0) -> None:
        """See `Machine.stop`."""
        await in_thread(self.sync.stop, timeout_s=timeout_s)

    async def kill(self) -> None:
        """See `Machine.kill`."""
        await in_thread(self.sync.kill)

    async def remove(self) -> None:
        """See `Machine.remove`."""
        await in_thread(self.sync.remove)

    async def __aenter__(self) -> AsyncMachine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.remove()

    def __repr__(self) -> str:
        return f"AsyncMachine({self.id!r})"
