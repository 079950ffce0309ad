"""The host side of the guest protocol as the rest of the house sees it (wire format: docs/internals/guest-protocol.md).

Everything that comes from the guest is hostile: bounded, validated, never trusted with a path or a length.
This room must know nothing of drivers, sessions, names or policies.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

TOKEN_PATH = "/run/recess/token"  # in the machine; memory, so that no cold boot finds an old one


@dataclass(frozen=True)
class ExecRequest:
    """A process to start in the guest. `argv[0]` is looked up in PATH. `user` is a name or "uid[:gid]"."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "root"
    tty: bool = False
    rows: int = 24
    cols: int = 80
    stdin: bool = False  # False: /dev/null
    job_id: str = ""  # empty: guestd picks one; a job id that exists already returns that job (idempotent)
    label: str = ""


@dataclass(frozen=True)
class JobInfo:
    """One row of the guest's job table. `exit_code` is None while it runs; 128+N when a signal N ended it."""

    job_id: str
    pid: int
    argv: tuple[str, ...]
    label: str
    started_s: float
    exit_code: int | None


@dataclass(frozen=True)
class Thaw:
    """What a machine learns when it wakes: `entropy` is 32 fresh bytes, `generation` never repeats."""

    wall_ns: int
    entropy: bytes
    generation: str
    epoch: int
    hostname: str
    machine_id: str
    env: Mapping[str, str] = field(default_factory=dict)  # written to /run/recess/env (broker port, labels)
    token: str = field(default="", repr=False)  # written to /run/recess/token; empty: what is there stays


@dataclass
class WakeUp:
    """A thaw that may travel with the first words to a restored machine, which then wakes once instead of twice: `make` makes
    it, fresh each time. `answer` is set by whoever sent it to a guestd that took it, else the thaw is still to be done;
    to be awaited with a bound in seconds, raises as `GuestLink.thaw` does."""

    make: Callable[[], Thaw]
    answer: Callable[[float], Awaitable[None]] | None = None


@dataclass(frozen=True)
class FileStat:
    """What `stat` says of a guest path: kind is file | dir | symlink | other."""

    path: str
    kind: str
    size: int
    mode: int
    mtime_s: float


class Job(Protocol):
    """A process in the guest and the streams attached to it. Closing the handle never ends the process."""

    job_id: str
    pid: int

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (1 or 2, bytes) until the process has ended and all is read. Output missed before attaching comes
        from the guest's ring; (0, b"") tells that older output was dropped from the ring."""
        ...

    async def write(self, data: bytes) -> None:
        """Send to stdin, waiting for credit."""
        ...

    async def close_stdin(self) -> None:
        """Send end of file."""
        ...

    async def signal(self, number: int) -> None:
        """Send a signal to the process group."""
        ...

    async def resize(self, rows: int, cols: int) -> None:
        """Tell a pty its size."""
        ...

    async def wait(self) -> int:
        """Return the exit code (128+N for a signal)."""
        ...

    async def detach(self) -> None:
        """Drop the streams; the process goes on, its output stays in the ring."""
        ...


class ByteStream(Protocol):
    """A two-way byte stream through the link, with credit both ways."""

    async def read(self, limit: int = 65536) -> bytes:
        """Return some bytes, b"" at the end. Raises GuestFailed when the link was cut."""
        ...

    async def write(self, data: bytes) -> None:
        """Send all, waiting for credit."""
        ...

    async def close_write(self) -> None:
        """Half-close."""
        ...

    async def close(self) -> None:
        """Close both ways; may be called twice."""
        ...


IncomingHandler = Callable[[str, Mapping[str, Any], ByteStream], Awaitable[None]]
"""Called once per stream that the guest opens: service ("proxy" or "session"), metadata, stream."""


class GuestLink(Protocol):
    """The connected channel to one guestd. Calls raise GuestFailed (guest's error or a broken protocol) or Timeout."""

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Return the round trip in seconds."""
        ...

    async def info(self) -> Mapping[str, Any]:
        """Return guestd's version, boot id, uptime_s, whether the workload is frozen, hostname."""
        ...

    async def exec(self, request: ExecRequest) -> Job:
        """Start a process, streams attached."""
        ...

    async def attach(self, job_id: str) -> Job:
        """Attach to a job that exists; raises NotFound."""
        ...

    async def jobs(self) -> list[JobInfo]:
        """Return the job table."""
        ...

    async def forget(self, job_id: str) -> None:
        """Drop an ended job and its ring. Raises NotFound; IllegalState for one that runs."""
        ...

    async def freeze(self, *, sync: bool = False, timeout_s: float = 2.0) -> None:
        """Freeze the workload's cgroup (after `syncfs` when asked). Raises GuestFailed if it does not get there."""
        ...

    async def thaw(self, thaw: Thaw, timeout_s: float = 10.0) -> None:
        """Reseed, set the clock and identity, run hooks, unfreeze. Any failure: do not serve."""
        ...

    async def unfreeze(self) -> None:
        """Only let the workload run again: the same machine, nothing was restored."""
        ...

    async def dial(self, port: int | str, host: str = "127.0.0.1") -> ByteStream:
        """Open a TCP connection inside the guest, or one to the Unix socket at the path `port`."""
        ...

    async def open_door(self, path: str) -> None:
        """Listen at this path in the guest; each connection is a stream of the service "socket", whose metadata say `path`.
        It lasts as long as the guest's memory. Again is well. BadInput: what is there is no socket, or too many."""
        ...

    def serve_incoming(self, handler: IncomingHandler) -> None:
        """Set the handler for streams that the guest opens; without one they are refused."""
        ...

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a whole file by temp name and rename; parents are made."""
        ...

    async def read_file(self, path: str, limit: int = 64 << 20) -> bytes:
        """Return a whole file; raises NotFound, or BadInput over the limit."""
        ...

    async def stat(self, path: str) -> FileStat:
        """Return what is there; raises NotFound."""
        ...

    async def list_dir(self, path: str) -> list[FileStat]:
        """Return at most 10,000 entries."""
        ...

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder; absent is not an error."""
        ...

    async def put_tar(self, path: str, archive: AsyncIterator[bytes], *, sparse: bool = False) -> None:
        """Unpack a tar stream below `path` (guest's own tar code in guestd, no shell). `sparse`: some of its files are written with
        their holes left out; Unsupported, before any of it is read, for a guestd that does not know how to read them."""
        ...

    async def stats(self) -> Mapping[str, Any]:
        """Return memory, load and process numbers of the guest."""
        ...

    async def close(self) -> None:
        """Cut the channel from the host side."""
        ...


@runtime_checkable
class TarReader(Protocol):
    """A link to a guest that reads whole folders. Not every one does: ask `isinstance`."""

    def get_tar(
        self, path: str, *, name: str = "", follow: bool = False, sparse: bool = False, skip: Sequence[str] = ()
    ) -> AsyncGenerator[bytes, None]:
        """Yield a tar of a file or folder, called `name` in it (empty: only what is in the folder), without the paths in
        `skip`. `sparse`: files with holes may come as GNU's sparse format 1.0 has them. Raises NotFound, BadInput (a file without a name), GuestFailed when it breaks off."""
        ...


@runtime_checkable
class Sealer(Protocol):
    """A link to a guest in which a place can be made read-only for all but the host. Not every one is: ask `isinstance`."""

    async def seal(self, path: str) -> str:
        """Let the workload read a folder or file, not write it; return the path by which the host goes on writing it (of a
        file its own: `unseal` it first). Again is well; it lasts as long as the guest's memory. Raises NotFound, Unsupported."""
        ...

    async def unseal(self, path: str) -> None:
        """Undo it for a file. One that is not sealed is well; Unsupported where nothing can be."""
        ...
