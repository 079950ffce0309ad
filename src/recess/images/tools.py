"""Runs the few outside programs that images need (apt-get, dpkg-deb, mmdebstrap, mkfs.ext4, skopeo, buildah) and says what went wrong.

Every program runs in its own process group, so that ending it ends what it started. Knows nothing of what they build.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from recess.errors import MissingTool, OutOfSpace, Unavailable

Progress = Callable[[str], None]
"""Gets one line at a time, for people. Called on the thread that builds."""

_TAIL_LINES = 20
_KEPT_LINES = 10_000
_CANCEL_CHECK_S = 0.2
_STOP_GRACE_S = 30.0  # mmdebstrap unmounts and removes its tree on SIGTERM; that takes a while
_PACKAGE_OF = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "apt-get": "apt",
    "apt-cache": "apt",
    "apt-config": "apt",
    "dpkg-deb": "dpkg",
    "skopeo": "skopeo",
    "buildah": "buildah",
}


def find_tool(name: str) -> str:
    """Return the path of a program; Debian's sbin folders count, although an ordinary user's PATH lacks them.

    Raises MissingTool with the package to install.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        package = _PACKAGE_OF.get(name, name)
        raise MissingTool(f"{name} is not installed", hint=f"apt-get install {package}  (or run tools/setup.sh)")
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, grace_s in ((signal.SIGTERM, _STOP_GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(grace_s)
            return
        except subprocess.TimeoutExpired:
            continue


def _lines(stream: IO[bytes], cancel: threading.Event | None) -> Iterator[str]:
    """Yield what a program prints, line by line, to its end. Raises KeyboardInterrupt soon after `cancel` is set."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(_CANCEL_CHECK_S if cancel else None):
                if cancel and cancel.is_set():
                    raise KeyboardInterrupt
                continue
            piece = os.read(stream.fileno(), 65536)
            if not piece:
                break
            *whole, pending = (pending + piece).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in whole)
    if pending:
        yield pending.decode(errors="replace").rstrip()


def run_tool(
    argv: Sequence[str | Path],
    *,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program to its end and return what it printed (standard output and error together, the last 10,000 lines).

    Raises MissingTool, OutOfSpace, or Unavailable with the last lines it printed in `details["log"]`. On any
    exception, Ctrl-C and `cancel` included, the program is asked to stop, then killed, and waited for.
    """
    command = [find_tool(str(argv[0])), *(str(a) for a in argv[1:])]
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        cwd=cwd,
        process_group=0,
    )
    printed = cast("IO[bytes]", process.stdout)  # PIPE was asked for
    try:
        for line in _lines(printed, cancel):
            lines.append(line)
            if progress:
                progress(line)
        process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        printed.close()
    if process.returncode:
        tail = list(lines)[-_TAIL_LINES:]
        log = "\n".join(tail)
        if any(
            "No space left on device" in line for line in lines
        ):  # often long before the last words of a package's scripts
            raise OutOfSpace(f"no space left while {argv[0]} ran", hint="free some space", log=log)
        raise Unavailable(f"{argv[0]} failed with status {process.returncode}: {_reason(tail)}", log=log)
    return "\n".join(lines)


def _reason(tail: Sequence[str]) -> str:
    """Pick the most telling line: the last that says error, else the last."""
    told = [line for line in tail if line.strip()]
    errors = [line for line in told if line.startswith(("E:", "error", "Error")) or "error:" in line.lower()]
    return (errors or told or ["no output"])[-1].strip()
