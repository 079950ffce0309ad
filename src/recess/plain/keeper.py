"""The keeper of one plain process: its parent, which outlives the server. Run as a script, standard library only.

    python -I -S keeper.py FOLDER JOB

FOLDER/JOB.json holds {argv, env, cwd}. It starts the process in a session of its own with output to JOB.out, writes JOB.pid
({pid, keeper, begun}: `begun` is the keeper's start time, so that a number that was used again is noticed), and at the end
JOB.code. Each file appears by rename, whole. Once a second it looks at FOLDER/deadline (seconds of the monotonic clock, of
this boot): when that has passed, it ends the process group. So a process whose server is gone, or was fenced, has a
living owner that needs no server, as a machine's has.

Exit code: 0 the process runs, 1 it could not be started and stderr says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

LOOK_MS = 1000


def put(path: str, text: str) -> None:
    """Write a file by rename."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)  # noqa: PTH105 - this script imports as little as it can


def begun(pid: int) -> str:
    """Return when a process began, in ticks since boot, "" if none lives. Format: proc(5), fields 3 and 22 of stat."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # one that nobody has reaped is dead, too
    except (OSError, IndexError):
        return ""


def start(spec: dict[str, Any], output: str) -> int:
    """Start the process and return its pid. Raises OSError if its program cannot be run."""
    failed, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            null, out = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for here, there in ((null, 0), (out, 1), (out, 2)):
                os.dup2(here, there)
            os.chdir(spec["cwd"])
            os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
        except OSError as exc:
            os.write(told, f"{exc.errno}".encode())
        os._exit(127)
    os.close(told)
    with os.fdopen(failed, "rb") as pipe:
        errno = pipe.read()
    if errno:
        os.waitpid(pid, 0)
        raise OSError(int(errno), os.strerror(int(errno)), spec["argv"][0])
    return pid


def watch(pid: int, deadline: str) -> int:
    """Return the exit code (128+N for a signal) when the process has ended, by itself or because its time was over."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while not poll.poll(LOOK_MS):
        with contextlib.suppress(OSError, ValueError), open(deadline, encoding="ascii") as file:
            if time.monotonic() > float(file.read()):
                os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code


def main(folder: str, job: str) -> int:
    """Start the process, leave it to a child of ours, and return."""
    with open(f"{folder}/{job}.json", encoding="utf-8") as file:
        spec = json.load(file)
    ready, told = os.pipe()
    if os.fork():
        os.close(told)
        with os.fdopen(ready, "rb") as pipe:
            why = pipe.read()
        if why != b"ok":
            sys.stderr.write(why.decode("utf-8", "replace") or "the keeper ended")
            return 1
        return 0
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        pid = start(spec, f"{folder}/{job}.out")
    except OSError as exc:
        os.write(told, f"{exc.filename or spec['argv'][0]}: {exc.strerror}".encode())
        os._exit(1)
    me = os.getpid()
    put(f"{folder}/{job}.pid", json.dumps({"pid": pid, "keeper": me, "begun": begun(me)}))
    os.write(told, b"ok")
    os.close(told)
    for number in (0, 1, 2):  # else whoever reads the server's output waits for our end
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    put(f"{folder}/{job}.code", str(watch(pid, f"{folder}/deadline")))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
