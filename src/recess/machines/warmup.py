"""What a template does before it is frozen: run the usual things once, so that every fork finds them in its page cache.

A pre-warmed template is the biggest saving of all (a session's layer falls from ~9 MB to ~3 MB), because pages equal
to the template's cost nothing. Every step is optional: an image without Python is warmed with what it has.
"""

from __future__ import annotations

import asyncio
import contextlib

from recess.errors import GuestFailed, NotFound, Timeout
from recess.guestlink.link import ExecRequest, GuestLink
from recess.machines.parts import Progress

VERSION = 3  # part of a template's key: raise it when the steps change
STEP_S = 120.0

_IMPORTS = [
    "asyncio",
    "json",
    "ssl",
    "http.client",
    "http.server",
    "urllib.request",
    "urllib.parse",
    "subprocess",
    "socket",
    "selectors",
    "pathlib",
    "re",
    "dataclasses",
    "inspect",
    "typing",
    "logging",
    "hashlib",
    "secrets",
    "uuid",
    "time",
    "datetime",
    "threading",
    "queue",
    "concurrent.futures",
    "tempfile",
    "shutil",
    "signal",
    "os",
    "sys",
    "io",
    "functools",
    "itertools",
    "collections",
    "contextlib",
    "traceback",
    "textwrap",
    "base64",
    "struct",
    "sqlite3",
    "importlib.util",
    "argparse",
    "shlex",
]

_PYTHON = f"""
import importlib
for name in {_IMPORTS!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import asyncio, subprocess
async def main():
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    writer.close()
    server.close()
asyncio.run(main())
subprocess.run(["sh", "-c", "true"])
"""

_COMMANDS = (
    "for c in 'git --version' 'curl --version' 'ls -la /' 'cat /etc/os-release' 'ps ax' 'env' 'id' 'date' 'uname -a' "
    "'df /' 'grep root /etc/passwd' 'sed -n 1p /etc/passwd' 'head -1 /etc/passwd' 'sort /etc/passwd' 'mkdir -p /tmp/w' "
    "'sleep 0' 'bash -c true'; do $c; done >/dev/null 2>&1; rm -rf /tmp/w"
)

STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("python", ("python3", "-c", _PYTHON)),
    ("commands", ("sh", "-c", _COMMANDS)),
    ("sync", ("sync",)),
)


async def warm_up(link: GuestLink, progress: Progress) -> None:
    """Run every step that the image can run; one that is missing or fails costs only warmth."""
    for name, argv in STEPS:
        progress(f"warming the template: {name}")
        # A job that ends badly, hangs or cannot be started leaves a colder template, not a broken one.
        with contextlib.suppress(NotFound, GuestFailed, Timeout):
            await _run(link, argv)
    for job in await link.jobs():
        with contextlib.suppress(NotFound, GuestFailed):
            await link.forget(job.job_id)


async def _run(link: GuestLink, argv: tuple[str, ...]) -> None:
    job = await link.exec(ExecRequest(argv=list(argv), cwd="/", label="warm-up"))
    try:
        async with asyncio.timeout(STEP_S):
            async for _ in job.output():
                pass
            await job.wait()
    except TimeoutError:
        await job.signal(9)
        await job.wait()
