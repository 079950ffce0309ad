"""A real guestd as an ordinary process on this host, for tests: no machine, no root, no mounts.

guestd listens on a unix socket, so a test can drop the channel and connect anew, as a restarted server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recess.config import load_config
from recess.errors import MissingTool
from recess.guestlink import Link, connect
from recess.guestlink.link import WakeUp


def find_guestd() -> Path:
    """Return the built guestd. Raises MissingTool."""
    guestd = load_config().bin_dir / "guestd"
    if not guestd.is_file():
        raise MissingTool(f"guestd is not built: {guestd}", hint="run make setup")
    return guestd


def writable_cgroup() -> Path | None:
    """Return the root of the host's unified cgroup tree if groups may be made in it: by root, unless it is confined."""
    roots = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    return next((p for p in roots if os.access(p / "cgroup.procs", os.W_OK)), None)


@dataclass
class GuestUnderTest:
    """A connected guest and what a test needs to know of it. `scratch` and `hooks` are paths inside the guest."""

    link: Link
    scratch: str
    run_dir: str
    hooks: str
    socket_path: str = ""
    switches_users: bool = False
    process: asyncio.subprocess.Process | None = None

    async def reconnect(self, wake: WakeUp | None = None) -> Link:
        """Drop the channel without a word, as a killed server does, and say hello again."""
        await self.link.close()
        self.link = await self.open_link(wake)
        return self.link

    async def open_raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a byte channel without a hello."""
        return await asyncio.open_unix_connection(self.socket_path)

    async def open_link(self, wake: WakeUp | None = None) -> Link:
        """Open a channel and say hello."""
        reader, writer = await self.open_raw()
        return await connect(reader, writer, hello_timeout_s=10, wake=wake)


@contextlib.asynccontextmanager
async def guestd_process(
    folder: Path, *, user: int | None = None, cgroup: Path | None = None, extra: Sequence[str] = ()
) -> AsyncIterator[GuestUnderTest]:
    """Run guestd with its sockets and files in `folder`; `user` drops to that uid (root only)."""
    paths = {name: folder / name for name in ("run", "hooks", "scratch")}
    for path in (folder, *paths.values()):
        path.mkdir(parents=True, exist_ok=True)
        if user is not None:
            os.chown(path, user, user)
    channel, guestd = folder / "channel.sock", find_guestd()
    if user is not None:  # somebody else may not be able to look into this source folder
        guestd = Path(shutil.copy(guestd, folder / "guestd"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(channel))
        listener.listen(4)
        argv = [str(guestd), "--serve-fd", str(listener.fileno()), "--run-dir", str(paths["run"])]
        argv += ["--proxy-port", "0", "--hooks", str(paths["hooks"]), *extra]
        argv += [] if cgroup is None else ["--cgroup", str(cgroup)]
        process = await asyncio.create_subprocess_exec(
            *argv, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=sys.stderr, user=user, group=user
        )
    guest: GuestUnderTest | None = None
    try:
        reader, writer = await asyncio.open_unix_connection(str(channel))
        link = await connect(reader, writer, hello_timeout_s=10)
        guest = GuestUnderTest(
            link=link,
            scratch=str(paths["scratch"]),
            run_dir=str(paths["run"]),
            hooks=str(paths["hooks"]),
            socket_path=str(channel),
            switches_users=user is None and os.getuid() == 0,
            process=process,
        )
        yield guest
    finally:
        if guest is not None:
            await guest.link.close()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 10)
