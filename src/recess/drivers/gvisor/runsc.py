"""The `runsc` command line: finding it, calling it, and waiting for what it writes of a machine's state.

Sources: gVisor's runsc/cmd and runsc/config of release 20240729 (the Debian package's). Every machine has a state
folder of its own, so its container is always called `vm`. This module knows nothing of pages or of guestd.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recess.config import Config
from recess.errors import DriverFailed, MissingTool, OutOfSpace, Timeout
from recess.images.files import hash_file

PLATFORM = "systrap"
MINIMUM_VERSION = 20240729  # roots straight from an EROFS file, images in three files
CONTAINER = "vm"
RUNNING, PAUSED = "running", "paused"

# Part of every snapshot's fingerprint: an image can only be restored under the flags it was taken with.
FLAGS = (f"--platform={PLATFORM}", "--network=none", "--overlay2=none", "--ignore-cgroups")

_CALL_TIMEOUT_S = 60.0
_VERSION_TIMEOUT_S = 10.0
_SAID_BYTES_MAX = 64 * 1024
_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE = 0x8, 0x80, 0x100


@dataclass(frozen=True)
class Runsc:
    """The runsc of this host. `version` as it says itself, `digest` BLAKE3-256 hex of the binary."""

    binary: Path
    version: str
    digest: str

    def argv(self, state: Path, *words: str) -> list[str]:
        """Return a command line over this state folder."""
        return [str(self.binary), f"--root={state}", *FLAGS, *words]


def find_runsc(config: Config) -> Path:
    """Return runsc's path: what is configured, else the home's (tools/runsc.sh), else PATH's. Raises MissingTool."""
    places = [config.runsc_bin] if config.runsc_bin else [str(config.home / "bin" / "runsc"), "runsc"]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        raise MissingTool(f"runsc is not there: {places[0]}", hint="tools/runsc.sh gets it; or set RECESS_RUNSC_BIN")
    return Path(found).absolute()


def inspect_runsc(binary: Path) -> Runsc:
    """Run it once for its version, and hash it. Raises MissingTool for one that is too old, DriverFailed."""
    try:
        done = subprocess.run(
            [str(binary), "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_VERSION_TIMEOUT_S,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as exc:
        raise DriverFailed(f"runsc does not run here: {exc}", log="") from exc
    said = done.stdout[:4096].decode(errors="replace")
    number = re.search(r"version\s+\S*?(20\d{6})", said)
    if number is None or int(number[1]) < MINIMUM_VERSION:
        raise MissingTool(
            f"runsc is too old or unknown: {said.strip().splitlines()[0] if said.strip() else 'it says nothing'}",
            hint=f"release {MINIMUM_VERSION} or later is needed; tools/runsc.sh gets it",
        )
    version = said.split("version", 1)[1].split()[0]
    return Runsc(binary, version, hash_file(binary))


async def call(runsc: Runsc, state: Path, *words: str, timeout_s: float = _CALL_TIMEOUT_S) -> None:
    """Run one command to its end. Raises DriverFailed with the first line it said (the rest is a Go trace),
    OutOfSpace, Timeout."""
    process = await asyncio.create_subprocess_exec(
        *runsc.argv(state, *words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(timeout_s):
            _out, said = await process.communicate()
    except TimeoutError as exc:
        raise Timeout(f"runsc {words[0]} took longer than {timeout_s:g} s") from exc
    finally:
        await end_process(process)
    if process.returncode:
        log = said[:_SAID_BYTES_MAX].decode(errors="replace").strip()
        if "no space left on device" in log:
            raise OutOfSpace(f"no space left for runsc {words[0]}", hint="free some memory, or stop other machines")
        first = log.splitlines()[0] if log else f"status {process.returncode}"
        raise DriverFailed(f"runsc {words[0]}: {first[:300]}", log=log[:2000])


async def end_process(process: asyncio.subprocess.Process) -> None:
    """Kill a child that still runs, and wait for it. Not by its own `kill`, which may collect it before asyncio does."""
    if process.returncode is None:
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(process.pid)
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)
        await process.wait()


def status(state: Path) -> str:
    """Return what runsc has noted of the machine: creating, created, running, paused, stopped; "" before that."""
    try:
        noted = json.loads((state / f"{CONTAINER}_sandbox:{CONTAINER}.state").read_bytes())
    except (OSError, ValueError):
        return ""  # not there, or just being written: another event follows
    return str(noted.get("status", "")) if isinstance(noted, dict) else ""


async def wait_running(state: Path) -> None:
    """Return when the machine runs. The caller bounds the wait, and knows if the machine is dead."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise DriverFailed(f"inotify: {os.strerror(ctypes.get_errno())}", log="")
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        mask = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE
        if libc.inotify_add_watch(fd, os.fsencode(state), mask) < 0:
            raise DriverFailed(f"inotify: {os.strerror(ctypes.get_errno())}", log="")
        loop.add_reader(fd, changed.set)
        while status(state) != RUNNING:
            await changed.wait()
            changed.clear()
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 65536)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def quoted(words: Sequence[str], cores: Sequence[int] = ()) -> list[str]:
    """Return a command line whose standard output goes to descriptor 4, where the keeper collects the console; with
    `cores`, on these processors only."""
    on = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    return ["/bin/sh", "-c", 'exec "$@" >&4', "sh", *on, *words]
