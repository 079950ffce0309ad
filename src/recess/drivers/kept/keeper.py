"""The server's side of the keeper (guest/keeper): start one, find one again, ask it things.

Protocol: guest/keeper/src/request.rs; one message on a SEQPACKET socket is one request or answer, pages travel as
descriptors. Requests are answered in order. This module knows nothing of QEMU's monitor or of guests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recess.drivers.kept.layout import KEEPER_SOCKET, Layout, socket_address
from recess.errors import DriverFailed, OutOfSpace, Timeout

_MESSAGE_LIMIT = 8192
_START_TIMEOUT_S = 30.0
_LAST_WORDS_S = 1.0
_END_S = 5.0
_NO_BASE = "-"
_BROUGHT_S, _LOOK_S = 120.0, 2.0


@dataclass(frozen=True)
class Obituary:
    """How a VMM ended: `end` is `exit:N`, `signal:N` or `unknown`, `log` the tail of its output."""

    end: str
    reason: str
    log: str

    def line(self) -> str:
        """Return it in one line."""
        how = {"exit": "exit code ", "signal": "signal "}
        kind, _, number = self.end.partition(":")
        return f"{self.reason} ({how.get(kind, kind)}{number})"


@dataclass(frozen=True)
class Process:
    """A process for ever: the start time (clock ticks since boot) tells it from a later one with its pid."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the process that has this pid now. Raises OSError if there is none."""
        return cls(pid, int(_stat(pid)[19]))

    def alive(self) -> bool:
        """Tell whether this very process exists (a zombie does not count)."""
        try:
            fields = _stat(self.pid)
        except OSError:
            return False
        return int(fields[19]) == self.start and fields[0] not in ("Z", "X")

    def kill(self) -> None:
        """SIGKILL to this process and no other: by descriptor, so that its pid cannot be another's meanwhile."""
        with contextlib.suppress(OSError), self.held() as fd:
            signal.pidfd_send_signal(fd, signal.SIGKILL)

    @contextlib.contextmanager
    def held(self) -> Iterator[int]:
        """Yield a pidfd of this very process. Raises ProcessLookupError when it has ended."""
        fd = os.pidfd_open(self.pid)
        try:
            if not self.alive():  # asked once the descriptor is held: it is of whoever has the pid then
                raise ProcessLookupError(f"process {self.pid} has ended")
            yield fd
        finally:
            os.close(fd)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on: the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def parse_obituary(text: str) -> Obituary:
    """Return what the keeper said at the end: `dead END REASON`, a newline, the log's tail."""
    head, _, log = text.partition("\n")
    _, end, reason = [*head.split(" ", 2), "", ""][:3]
    return Obituary(end or "unknown", reason or "no reason was told", log)


def read_obituary(layout: Layout) -> Obituary | None:
    """Return what the keeper recorded at the VM's end, or None if it has not ended (or the keeper with it)."""
    try:
        return parse_obituary(layout.end_record.read_text(errors="replace"))
    except OSError:
        return None


def read_pids(layout: Layout) -> dict[str, Process]:
    """Return what the keeper wrote of itself ("keeper") and of QEMU ("vmm"); empty if it never got there."""
    try:
        lines = layout.pids.read_text().splitlines()
        return {name: Process(int(pid), int(start)) for name, pid, start in (line.split() for line in lines)}
    except (OSError, ValueError):
        return {}


def launch(
    binary: Path,
    layout: Layout,
    ram: Path,
    argv: Sequence[str],
    *,
    tether: int | None = None,
    group: Path | None = None,
    filtered: bool = False,
) -> None:
    """Start a keeper and its VMM; returns when QEMU was executed (not yet ready). Blocks some milliseconds.

    `group` is the control group that the VMM is put into; the keeper removes it at the end. `tether` is the reading end of
    a pipe: if the other end closes before a word was said there, the VM is ended. `filtered`: the VMM gets three streams,
    through which the keeper filters what its network card sends (guest/keeper/src/card.rs).
    Raises DriverFailed with what was said when either could not be started; nothing then runs.
    """
    layout.end_record.unlink(missing_ok=True)  # of an earlier life
    command = [str(binary), "run", "--dir", str(layout.run), "--ram", str(ram), "--console", str(layout.console)]
    command += ["--record", str(layout.end_record), *(["--tether"] if tether is not None else [])]
    command += [*(["--cgroup", str(group)] if group is not None else [])]
    command += [*(["--card"] if filtered else []), "--", *argv]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL if tether is None else tether, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=_START_TIMEOUT_S, check=False, cwd="/",
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise DriverFailed(f"no keeper at {binary}", hint="run tools/setup.sh", log="") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise DriverFailed(f"the keeper could not be started: {exc}", log="") from exc
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-2000:]
        raise DriverFailed(f"the VM could not be started: {said}", log=said)


class Keeper:
    """A connection to one keeper. `death` is done when the VMM (or the keeper, and with it the VMM) is gone."""

    def __init__(self, sock: socket.socket, layout: Layout) -> None:
        self._sock = sock
        self._layout = layout
        self.pid, _uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._loop = asyncio.get_running_loop()
        self._answers: deque[asyncio.Future[tuple[str, int | None]]] = deque()
        self.death: asyncio.Future[Obituary] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.filled = asyncio.Event()  # set when the last pager has brought its last page
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    def connect(cls, layout: Layout) -> Keeper:
        """Connect to the keeper of this VM. Raises DriverFailed if there is none, with the VM's last words if any."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            with socket_address(layout.run, KEEPER_SOCKET) as address:
                sock.connect(address)
            sock.setblocking(False)
        except OSError as exc:
            sock.close()
            obituary = read_obituary(layout)
            if obituary is not None:
                raise DriverFailed(f"the VM has ended: {obituary.line()}", log=obituary.log) from exc
            raise DriverFailed(f"the VM's keeper cannot be reached: {exc.strerror}", log="") from exc
        return cls(sock, layout)

    async def deadline(self, seconds: float | None) -> None:
        """Have the VM killed this many seconds from now; None takes the deadline away."""
        await self._ask("deadline none" if seconds is None else f"deadline {max(0, int(seconds * 1000))}")

    async def kill(self) -> None:
        """Have the VM killed; `death` follows."""
        await self._ask("kill")

    async def prepare(self, which: str = "") -> None:
        """Make and touch the buffer of the capture to come, while the VM still runs. With `which` (delta, all) also
        copy what was written, of a tracked VM, until little is left for the pause."""
        await self._ask(f"prepare {which}".strip())

    async def track(self, base: str, *, user_only: bool, known: int | None = None) -> str:
        """Note every write from now on; to be asked before the VM runs. Returns the way: kernel or user.

        `base`: the snapshot whose memory this is, or "". `known`: a descriptor with ranges (u32 first page, u32 count)
        that differ from the RAM file without having been written.
        """
        text, _ = await self._ask(f"track {base or _NO_BASE} {'user' if user_only else 'any'}", known)
        return text.removeprefix("way=")

    async def track_absent(self, base: str, ranges: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Like `track`, and the pages of `ranges` are absent from now on: whoever touches one waits for a pager.

        Returns the userfaultfd, and where the memory is: (address, first page, pages).
        """
        text, fd = await self._ask(f"track {base or _NO_BASE} wait", ranges)
        if fd is None:
            raise DriverFailed(f"the keeper sent no userfaultfd: {text}")
        found = []
        for word in text.partition("at=")[2].split(","):
            address, first, pages = word.split(":")
            found.append((int(address, 16), int(first), int(pages)))
        return fd, found

    async def guard(self, pipe: int, process: int) -> None:
        """Have the VM ended if the other end of this pipe closes, or the process of this pidfd ends, before a word was said
        there."""
        await self._ask("guard", pipe)
        await self._ask("guard-process", process)

    async def move(self, layout: Layout) -> None:
        """Have the console and the record of the end written into this layout's directory from now on, the console with
        what it holds so far. The run folder may be renamed at any time: the keeper lives in it and follows."""
        layout.end_record.unlink(missing_ok=True)  # of an earlier life
        folder = os.open(layout.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await self._ask(f"move {layout.console.name} {layout.end_record.name}", folder)
        finally:
            os.close(folder)
        self._layout = layout

    async def tracking(self) -> tuple[str, str, bool]:
        """Return how the VM is tracked (kernel, user, none), the base, and whether pages are still being brought."""
        text, _ = await self._ask("tracking")
        told = dict(word.split("=", 1) for word in text.split(" "))
        base = told.get("base", _NO_BASE)
        return told.get("way", "none"), "" if base == _NO_BASE else base, told.get("absent", "0") != "0"

    async def capture_tracked(self, which: str) -> tuple[int, int]:
        """Copy the rest of a stopped VM's pages: delta (since the base) or all. Returns (pages, generation)."""
        text, _ = await self._ask(f"capture {which}")
        pages, generation = (int(word.partition("=")[2]) for word in text.split(" "))
        return pages, generation

    async def collect(self) -> tuple[int, int]:
        """Return what `capture_tracked` took, in order: (descriptor, pages)."""
        text, fd = await self._ask("collect")
        if fd is None:
            raise DriverFailed(f"the keeper sent no pages: {text}")
        return fd, int(text.removeprefix("pages="))

    async def committed(self, generation: int, base: str) -> None:
        """Tell that the capture of this generation (0: what the VM was started from) is stored as `base`."""
        await self._ask(f"committed {generation} {base}")

    async def release(self) -> None:
        """Drop a prepared buffer."""
        await self._ask("release")

    async def capture(self, kind: str) -> tuple[int, int]:
        """Copy pages of the stopped VM: kind is private, file or file-all. Returns (descriptor, pages)."""
        text, fd = await self._ask(f"capture {kind}")
        if fd is None:
            raise DriverFailed(f"the keeper sent no pages: {text}")
        return fd, int(text.removeprefix("pages="))

    async def inject(self, fd: int, pages: int) -> None:
        """Put pages from a descriptor (laid out as `disk.pack_pages` does) into the VM's memory."""
        await self._ask(f"inject {pages}", fd)

    async def remap(self, files: Sequence[int], runs: bytes) -> None:
        """Map runs of files over the VM's memory, before it runs and before it is tracked; see `MappedMemory`."""
        for file in files:
            await self._ask("file", file)
        table = os.memfd_create("recess-runs", os.MFD_CLOEXEC)
        try:
            os.write(table, runs)
            await self._ask("remap", table)
        finally:
            os.close(table)

    async def _ask(self, request: str, fd: int | None = None, timeout_s: float = 60.0) -> tuple[str, int | None]:
        if self.death.done() or self.gone.done():
            raise DriverFailed(f"the VM is gone, cannot {request.split()[0]}")
        answer: asyncio.Future[tuple[str, int | None]] = self._loop.create_future()
        try:
            if fd is None:
                self._sock.send(request.encode(), socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self._sock, [request.encode()], [fd], socket.MSG_NOSIGNAL)
        except OSError as exc:
            raise DriverFailed(f"the keeper takes no requests: {exc.strerror}") from exc
        self._answers.append(answer)
        try:
            # Shielded: the answer comes in its turn even if nobody waits for it any more.
            async with asyncio.timeout(timeout_s):
                text, got = await asyncio.shield(answer)
        except TimeoutError as exc:
            answer.add_done_callback(_drop)
            raise Timeout(f"the keeper did not answer within {timeout_s:g} s") from exc
        except asyncio.CancelledError:
            answer.add_done_callback(_drop)
            raise
        verdict, _, rest = text.partition(" ")
        if verdict == "ok":
            return rest, got
        code, _, why = rest.partition(" ")
        if code == "no-space":
            raise OutOfSpace(f"the host has no memory for this: {why}")
        raise DriverFailed(f"the keeper could not {request.split()[0]}: {why}")

    def _readable(self) -> None:
        while not self.gone.done():
            try:
                data, fds, _flags, _ = socket.recv_fds(self._sock, _MESSAGE_LIMIT, 1, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, fds = b"", []
            text = data.decode(errors="replace")
            fd = fds[0] if fds else None
            if not data:
                self._lose("its keeper is gone")
            elif text == "filled":
                self.filled.set()
            elif text.startswith("dead "):
                self._bury(text)
            elif self._answers:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_result((text, fd))
                elif fd is not None:
                    os.close(fd)

    def _bury(self, text: str) -> None:
        if not self.death.done():
            self.death.set_result(parse_obituary(text))

    def close(self) -> None:
        """Drop the connection; keeper and VM go on, and `death` fails with DriverFailed. May be called twice."""
        if not self.death.done():
            self.death.set_exception(DriverFailed("the server has let go of the VM"))
            self.death.exception()
        self._lose("the server has let go of the VM")

    def _lose(self, why: str) -> None:
        if self.gone.done():
            return
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self.gone.set_result(None)
        if not self.death.done():
            self.death.set_result(read_obituary(self._layout) or Obituary("unknown", why, ""))
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_exception(DriverFailed(f"the VM is gone: {why}"))
                answer.exception()


async def last_words(keeper: Keeper) -> Obituary | None:
    """Return how the VM ended if it did so now or within a moment, else None."""
    await asyncio.wait([keeper.death], timeout=_LAST_WORDS_S)
    if keeper.death.done() and keeper.death.exception() is None:
        return keeper.death.result()
    return None


async def end_vm(layout: Layout, keeper: Keeper | None) -> None:
    """End keeper and VMM, whichever still lives, and remove the run folder. Never fails, bounded in time."""
    pids = read_pids(layout)
    if keeper is not None:
        with contextlib.suppress(Exception):  # it may be dying already
            await keeper.kill()
        await asyncio.wait([keeper.gone], timeout=_END_S)
        await wait_gone(keeper.pid, _END_S)  # the socket closes a moment before the process is gone
    for name in ("keeper", "vmm"):  # should the keeper hang: with it the kernel ends the VMM
        process = pids.get(name)
        if process is not None and process.alive():
            process.kill()
            await wait_gone(process.pid, _END_S)
    layout.remove_run()


async def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until this process is gone (it need not be a child); False if it is still there."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return True
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(fd, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _drop(answer: asyncio.Future[tuple[str, int | None]]) -> None:
    """Close the descriptor of an answer that nobody waits for."""
    if not answer.cancelled() and answer.exception() is None:
        fd = answer.result()[1]
        if fd is not None:
            os.close(fd)


async def all_brought(keeper: Keeper) -> None:
    """Return when no pager brings pages any more: the keeper tells, whichever server ordered the pager. Raises Timeout,
    DriverFailed."""
    try:
        async with asyncio.timeout(_BROUGHT_S):
            keeper.filled.clear()  # before it is asked: it may be told between the answer and our waiting
            while (await keeper.tracking())[2]:
                await _told(keeper)
                keeper.filled.clear()
    except TimeoutError as exc:
        raise Timeout(f"the machine's memory was not there within {_BROUGHT_S:g} s") from exc


async def _told(keeper: Keeper) -> None:
    """Return when the keeper says that all is there, or the VM is gone; and now and then, for a keeper of an earlier
    version, which says nothing."""
    waiting: set[asyncio.Future[Any]] = {asyncio.ensure_future(keeper.filled.wait()), keeper.death, keeper.gone}
    try:
        await asyncio.wait(waiting, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting - {keeper.death, keeper.gone}:
            one.cancel()
