"""Everything around the story: a home of its own, the server process, the providers on loopback. Made and cleaned here.

The home is new for each telling and lies inside the user's, whose images it shares by a link; only a template is kept
for the next telling (`seed`), so that state never mixes. The server is a real process, so that it can be killed like one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from recess.config import Config, load_config
from recess.demo import seed
from recess.demo.client import StoryClient
from recess.demo.processes import HostProcess, kill_all, processes_of, wait_gone
from recess.demo.report import Report, StoryFailed
from recess.demo.site import repository
from recess.errors import MissingTool, RecessError
from recess.testing.git_server import GitServer
from recess.testing.model_server import ModelServer
from recess.testing.payment_server import PaymentServer

SERVER_START_S = 60.0
SERVER_STOP_S = 30.0
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass
class World:
    """What the acts use."""

    report: Report
    config: Config  # of the story's own home
    client: StoryClient
    model: ModelServer
    pay: PaymentServer
    git: GitServer
    seed: Path
    server: subprocess.Popen[bytes] | None = None
    memory: dict[str, str] = field(default_factory=dict)  # what one act saw and a later one compares

    def machines(self) -> list[HostProcess]:
        """Return the processes of all virtual machines of this home; those that wait for the next one are nobody's."""
        own = self.server.pid if self.server else 0
        found = processes_of(self.config.run_dir, but_in=self.config.run_dir / "warm")
        return [one for one in found if one.pid != own]

    async def start_server(self) -> float:
        """Start the server and wait until it answers; return the seconds it took. Raises StoryFailed."""
        started = time.monotonic()
        self.server = _spawn(self.config)
        while time.monotonic() - started < SERVER_START_S:
            if self.config.socket_path.exists():
                with contextlib.suppress(RecessError, OSError):
                    await self.client.call("GET", "/v1/info")
                    return time.monotonic() - started
            if self.server.poll() is not None:
                break
            await asyncio.sleep(0.01)  # another process's socket: there is no event to wait for
        seed.forget(self.seed)  # if it was to blame, the next telling works
        raise StoryFailed("the server did not come up", seen=server_tail(self.config, 300))

    async def kill_everything(self) -> list[int]:
        """SIGKILL the server and all machines' processes at once; return the pids that were killed."""
        if self.server is None:
            raise StoryFailed("there is no server to kill")
        pids = [self.server.pid, *(one.pid for one in self.machines())]
        kill_all(pids)
        await asyncio.to_thread(self.server.wait)
        left = await wait_gone(pids, SERVER_STOP_S)
        if left:
            raise StoryFailed(f"processes outlive SIGKILL: {left}")
        return pids

    async def keep_template(self) -> None:
        """Keep the template that was just made for the next telling; the server is ended and started again for it."""
        await self._end_server()
        await asyncio.to_thread(seed.keep, self.config.home, self.seed)
        await self.start_server()

    async def _end_server(self) -> None:
        server, self.server = self.server, None
        if server is None or server.poll() is not None:
            return
        with contextlib.suppress(RecessError, OSError):
            await self.client.call("POST", "/v1/shutdown", {"detach": False})
        try:
            await asyncio.to_thread(server.wait, SERVER_STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            await asyncio.to_thread(server.wait)

    async def stop(self) -> list[int]:
        """End the server and its machines in good order; return the pids of machines that it left behind."""
        await self._end_server()
        left = await wait_gone([one.pid for one in self.machines()], 10.0)
        kill_all(left)
        return left


def _spawn(config: Config) -> subprocess.Popen[bytes]:
    with (config.home / "server.log").open("ab") as log:
        return subprocess.Popen(
            server_command(config), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def server_command(config: Config) -> list[str]:
    """Return the server's command line: the caller's environment, with the story's own settings on top."""
    settings = {
        "RECESS_HOME": str(config.home),
        "RECESS_RUN_DIR": str(config.run_dir),
        "RECESS_DRIVER": config.driver,
        "RECESS_QEMU_BIN": config.qemu_bin,
        "RECESS_ACCELERATOR": config.accelerator,
        "RECESS_RUNSC_BIN": config.runsc_bin,
        "RECESS_BIN_DIR": str(config.bin_dir),
        "RECESS_AGENT_DIR": str(config.agent_dir),
        "RECESS_URL": "",
        "RECESS_CRASH_POINT": "",
    }
    pairs = [f"{name}={value}" for name, value in settings.items()]
    return ["env", *pairs, sys.executable, "-m", "recess.cli.main", "up", "--detached"]


def story_config(user: Config, home: Path) -> Config:
    """Return the configuration of the story's home: the user's driver and tools, another home and run directory."""
    own = user.home / "bin" / "runsc"  # where the set-up puts it
    return load_config(
        {}, home=str(home), driver=user.driver, qemu_bin=user.qemu_bin, accelerator=user.accelerator,
        runsc_bin=user.runsc_bin or (str(own) if own.exists() else ""), bin_dir=str(user.bin_dir), agent_dir=str(user.agent_dir),
    )  # fmt: skip


def make_home(user: Config, keys: dict[str, str]) -> Path:
    """Make the story's home: the user's images by a link, the providers' keys as secrets (private files)."""
    user.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    user.images_dir.mkdir(exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="demo-", dir=user.home))
    (home / "images").symlink_to(user.images_dir)
    folder = home / "secrets"
    folder.mkdir(mode=0o700)
    for name, value in keys.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(value)
    return home


def example_folder() -> Path:
    """Return the folder of the example agent, in the wheel or in the source tree. Raises MissingTool."""
    for folder in (_PACKAGE / "_examples" / "coder", _PACKAGE.parents[1] / "examples" / "coder"):
        if (folder / "agent.py").is_file():
            return folder
    raise MissingTool("the example agent is not installed", hint="run the demo from a source tree or reinstall recess")


@contextlib.asynccontextmanager
async def open_world(user: Config, report: Report, *, keep: bool) -> AsyncIterator[World]:
    """Make the world, and leave nothing of it behind: no process, no run directory, and no home unless `keep`."""
    keys = {"llm": "sk-" + secrets.token_hex(24), "pay": "pk-" + secrets.token_hex(24)}
    home = make_home(user, keys)
    kept = seed.seed_path(user.home)
    await asyncio.to_thread(seed.sow, kept, home)
    config = story_config(user, home)
    try:
        async with (
            ModelServer(keys["llm"]) as model,
            PaymentServer(keys["pay"]) as pay,
            GitServer("site", repository(), "A small site to start from") as git,
        ):
            world = World(report, config, StoryClient(config.socket_path), model, pay, git, kept)
            try:
                yield world
            finally:
                pay.release()
                await world.stop()
    finally:
        shutil.rmtree(config.run_dir, ignore_errors=True)
        if keep:
            report.tell(f"kept: {home}")
        else:
            (home / "images").unlink(missing_ok=True)
            shutil.rmtree(home, ignore_errors=True)


def server_tail(config: Config, limit: int = 3000) -> str:
    """Return the end of the server's log, "" if there is none."""
    try:
        return (config.home / "server.log").read_bytes()[-limit:].decode(errors="replace")
    except OSError:
        return ""
