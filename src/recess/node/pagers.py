"""The server's side of pagers: the nursery process, and one handle per machine that is restored lazily.

Fulfils `recess.machines.contract.LazyMemory`. What runs in those processes is `recess.node.pager`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recess.config import Config
from recess.errors import DriverFailed, Timeout, Unavailable
from recess.machines.contract import PageSet
from recess.machines.mapped import MEMORY
from recess.node.pager import MESSAGE_MAX, TOUCHED_MAX
from recess.node.stores import page_files_reserve
from recess.paging.book import RUNS_MAX

READY_S = 30.0
SNAPSHOTS_MAX = 256
_NURSERY_S = 20.0

ReadAll = Callable[[], Awaitable[PageSet]]
KeepFile = Callable[[str, str, int, bytes, int], None]  # snapshot, template, pages in all, runs, file

log = logging.getLogger(__name__)


class Pagers:
    """Makes pagers. The nursery is started by `warm` or by the first order, and ends with `close` or with this process."""

    def __init__(self, config: Config, keep: KeepFile | None = None) -> None:
        # What a pager needs to open the same store; nothing else of the configuration reaches it.
        keys = ("store", "s3_endpoint", "s3_region", "s3_access_key_id", "s3_secret_access_key", "s3_session_token")
        self._order = {"home": str(config.home), "overrides": {k: getattr(config, k) for k in keys}}
        self._memory_of = config.home / "touched"
        self._keep = keep if config.page_files_bytes and config.lazy_memory == "auto" else None
        self._room = {
            "folder": str(config.pages_dir),
            "max_bytes": config.page_files_bytes, "reserve_bytes": page_files_reserve(config),
        }  # fmt: skip
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = asyncio.Lock()

    async def warm(self) -> None:
        """Have the nursery there. Raises Unavailable, Timeout."""
        async with self._starting:
            if self._sock is None or (self._process is not None and self._process.poll() is not None):
                self.close()
                await self._start()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "recess.node.pager", str(theirs.fileno())]
            try:
                self._process = await asyncio.to_thread(
                    subprocess.Popen, command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/",
                    env=self._environment(),
                )  # fmt: skip
            except OSError as exc:
                ours.close()
                raise Unavailable(f"no pager could be started: {exc}") from exc
        ours.setblocking(False)
        self._sock = ours
        message, _ = await _receive(ours, _NURSERY_S)
        if message is None:
            self.close()
            raise Unavailable("the pagers' nursery ended at its start")

    @staticmethod
    def _environment() -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LANG": "C.UTF-8"}

    async def make(
        self, snapshot: str, part: str, template: Path, files: Mapping[str, Path], read_all: ReadAll
    ) -> Pager:
        """Return a pager that is opening this snapshot. `files`: image files by hash; `read_all`: for a host that cannot."""
        await self.warm()
        sock = self._sock
        if sock is None:
            raise Unavailable("the pagers' nursery is gone")
        working_set = WorkingSet(self._memory_of / f"{snapshot}.{part}")
        first = await asyncio.to_thread(working_set.read)  # told at once: it is read while the machine starts
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = {
            **self._order, "snapshot": snapshot, "part": part, "template": str(template),
            "files": {digest: str(path) for digest, path in files.items()}, "first": first,
            "keep": self._room if self._keep is not None and part == MEMORY else None,
        }  # fmt: skip
        with theirs:
            try:
                socket.send_fds(sock, [json.dumps(order).encode()], [theirs.fileno()], socket.MSG_NOSIGNAL)
            except OSError as exc:
                ours.close()
                self.close()
                raise Unavailable(f"the pagers' nursery is gone: {exc.strerror}") from exc
        ours.setblocking(False)
        return Pager(ours, read_all, working_set, None if self._keep is None else partial(self._keep, snapshot))

    def first_pages(self, snapshot: str) -> list[int]:
        """Return what machines of this snapshot touched first on this node; none if nothing is known."""
        return WorkingSet(self._memory_of / f"{snapshot}.{MEMORY}").read()

    def close(self) -> None:
        """End the nursery; pagers that serve go on. May be called twice."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._process = None


class WorkingSet:
    """What a snapshot's machines touched in their first moments, kept on this node: the next one gets it first.

    A hint and nothing more: lost, damaged or out of date, it costs faults. `path`: u32 page numbers, little endian.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[int]:
        """Return the pages, in the order they were asked for; none if nothing is known."""
        try:
            data = self._path.read_bytes()[: 4 * TOUCHED_MAX]
        except OSError:
            return []
        return [page for (page,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])]

    def add(self, pages: Sequence[int]) -> None:
        """Put pages behind those that are known. The oldest snapshots are forgotten beyond a number. Never fails."""
        together = list(dict.fromkeys([*self.read(), *pages]))[:TOUCHED_MAX]
        folder = self._path.parent
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            aside.write_bytes(b"".join(struct.pack("<I", page) for page in together))
            aside.replace(self._path)
            kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in kept[SNAPSHOTS_MAX:]:
                path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("the working set of %s was not kept: %s", self._path.name[:24], exc)


class Pager:
    """One pager, from its order to its end. `report` is set when it has brought every page."""

    def __init__(
        self,
        sock: socket.socket,
        read_all: ReadAll,
        working_set: WorkingSet,
        keep: Callable[[str, int, bytes, int], None] | None = None,
    ) -> None:
        self._sock = sock
        self._keep = keep
        weakref.finalize(self, sock.close)  # a restore that failed before it came to this: the pager ends by it
        self._read_all = read_all
        self._working_set = working_set
        self._watching: asyncio.Task[None] | None = None
        self._process = -1
        self.report: Mapping[str, Any] | None = None
        self.failure = ""

    async def ranges(self) -> int:
        """Return a descriptor with the absent runs, once the snapshot is open; the caller closes it."""
        message, fds = await _receive(self._sock, READY_S)
        if message is None or "ready" not in message or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise DriverFailed(f"the pager could not open the snapshot: {(message or {}).get('failed', 'it ended')}")
        self._process = fds[1]
        weakref.finalize(self, os.close, fds[1])
        return fds[0]

    def process(self) -> int:
        """Return its pidfd. Raises DriverFailed before `ranges` has returned."""
        if self._process < 0:
            raise DriverFailed("the pager has not told what it is")
        return self._process

    async def serve(
        self,
        uffd: int,
        pipe: int,
        vmm: int,
        segments: Sequence[tuple[int, int, int]],
        first: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> None:
        """Hand it the memory; returns when faults are being answered. The descriptors stay the caller's, to close."""
        order = json.dumps({"segments": [list(s) for s in segments], "first": list(first), "whole": whole}).encode()
        try:
            socket.send_fds(self._sock, [order], [uffd, pipe, vmm], socket.MSG_NOSIGNAL)
        except OSError as exc:
            raise DriverFailed(f"the pager ended: {exc.strerror}") from exc
        message, _ = await _receive(self._sock, READY_S)
        if message is None or "serving" not in message:
            raise DriverFailed(f"the pager does not serve: {(message or {}).get('failed', 'it ended')}")
        self._watching = asyncio.create_task(self._watch(), name="pager")

    async def _watch(self) -> None:
        message, fds = await _receive(self._sock, None)
        self._sock.close()
        if message is not None and "filled" in message:
            self.report = message["filled"]
            await asyncio.to_thread(self._remember, message, fds)
        else:
            self.failure = str((message or {}).get("failed", "it ended"))
            log.error("a pager failed, and its machine with it: %s", self.failure)

    def _remember(self, message: dict[str, Any], fds: list[int]) -> None:
        """Keep what was touched first, and the pages if they were written down."""
        try:
            self._working_set.add([int(page) for page in message["filled"]["touched"]])
            if self._keep is not None and "kept" in message and len(fds) == 2:
                ranges = os.pread(fds[1], 8 * RUNS_MAX, 0)
                self._keep(str(message["kept"]["ground"]), int(message["kept"]["pages"]), ranges, fds[0])
        finally:
            for fd in fds:
                os.close(fd)

    async def filled(self) -> Mapping[str, Any] | None:
        """Return the report when every page is there; None if the pager failed (its machine is then ended)."""
        if self._watching is not None:
            await asyncio.shield(self._watching)
        return self.report

    async def read_all(self) -> PageSet:
        """Return all pages at once, for a host that cannot serve faults."""
        return await self._read_all()

    def about(self) -> Mapping[str, Any]:
        """Say how far it is."""
        if self.report is not None:
            return {"state": "every page is there", **{k: v for k, v in self.report.items() if k != "touched"}}
        return {"state": self.failure or "pages come as they are touched"}

    async def close(self) -> None:
        """Let go of it: one that serves goes on, one that does not ends. May be called twice."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._sock.close()


async def _receive(sock: socket.socket, timeout_s: float | None) -> tuple[dict[str, Any] | None, list[int]]:
    """Return one message and its descriptors; None when the other side is gone. Raises Timeout."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), lambda: None if ready.done() else ready.set_result(None))
    try:
        async with asyncio.timeout(timeout_s):
            await ready
    except TimeoutError as exc:
        raise Timeout("the pager did not answer") from exc
    finally:
        loop.remove_reader(sock.fileno())
    try:
        data, fds, _flags, _ = socket.recv_fds(sock, MESSAGE_MAX, 2, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None, []
    return (json.loads(data) if data else None), fds
