"""A whole session runtime without a VM or a database, for tests: memory log, process machines, agents in a dict."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recess.catalog import AgentVersion, agent_version
from recess.clock import SystemClock
from recess.contextlog.contract import ContextLog, Entry
from recess.contextlog.memory import MemoryLog
from recess.errors import NotFound
from recess.sessions.deps import Deps, Settings
from recess.sessions.observing import Observers
from recess.sessions.service import Sessions
from recess.testing.session_agents import coder
from recess.testing.session_harness import ProcessMachines
from recess.testing.session_link import ProcessLink

AGENT_PACKAGE = Path(__file__).resolve().parents[1] / "_agent"


class MemoryAgents:
    """`AgentStore` in a dict."""

    def __init__(self) -> None:
        self._versions: dict[str, list[tuple[AgentVersion, dict[str, bytes]]]] = {}
        self._count = 0

    async def deploy(
        self, agent: str, files: Mapping[str, bytes], config: Mapping[str, Any], *, now: float
    ) -> AgentVersion:
        self._count += 1
        version = AgentVersion(agent, agent_version(files, config), self._count, now, 0, dict(config))
        kept = [one for one in self._versions.get(agent, []) if one[0].version != version.version]
        self._versions[agent] = [*kept, (version, dict(files))]
        return version

    async def current(self, agent: str) -> AgentVersion:
        if agent not in self._versions:
            raise NotFound(f"no such agent: {agent}")
        return self._versions[agent][-1][0]

    async def get(self, agent: str, version: str) -> AgentVersion:
        return (await self._find(agent, version))[0]

    async def files(self, agent: str, version: str) -> dict[str, bytes]:
        return (await self._find(agent, version))[1]

    async def _find(self, agent: str, version: str) -> tuple[AgentVersion, dict[str, bytes]]:
        for one in self._versions.get(agent, []):
            if one[0].version == version:
                return one
        raise NotFound(f"no such version: {agent}@{version}")


class JumpClock(SystemClock):
    """The system's clocks, with a hand on them: `jump` lets time pass at once, for sleepers too."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._wall = 0.0
        self._jumped: set[asyncio.Event] = set()

    def wall_s(self) -> float:
        return super().wall_s() + self._ahead + self._wall

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._ahead

    async def sleep(self, seconds: float) -> None:
        until, jumped = self.monotonic_s() + seconds, asyncio.Event()
        self._jumped.add(jumped)
        try:
            while (left := until - self.monotonic_s()) > 0:
                jumped.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(jumped.wait(), left)
        finally:
            self._jumped.discard(jumped)

    def set_wall(self, seconds: float) -> None:
        """Set the wall clock off by this much, as somebody who corrects it does; the monotonic clock goes on."""
        self._wall = seconds

    def jump(self, seconds: float) -> None:
        """Let this much time have passed."""
        self._ahead += seconds
        for event in self._jumped:
            event.set()


@dataclass
class World:
    """The parts of a runtime, and shortcuts that wait for what happens instead of sleeping."""

    machines: ProcessMachines
    log: ContextLog
    agents: MemoryAgents
    settings: Settings
    reopen: Callable[[], Awaitable[ContextLog]] | None = None  # for a log that a crashed server's successor opens anew
    clock: JumpClock = field(default_factory=JumpClock)
    observers: Observers = field(default_factory=Observers)  # of every server of this world
    sessions: Sessions = field(init=False)

    def __post_init__(self) -> None:
        self.sessions = self.new_server()

    def new_server(self) -> Sessions:
        """Return another `Sessions` over the same log and machines, as after a restart."""
        self.sessions = Sessions(Deps(self.log, self.machines, self.agents, self.clock, self.settings, self.observers))
        return self.sessions

    async def crash_server(self) -> Sessions:
        """Lose the server without any goodbye: its tasks end, nothing is written; return the next one."""
        await self.sessions.abandon()
        await self.machines.server_died()
        if self.reopen is not None:
            self.log = await self.reopen()
        return self.new_server()

    async def strike(self, machine: str, victim: str) -> None:
        """Take away the agent's process ("agent"), the guest's channel ("guestd") or the whole machine, if it is there."""
        if machine not in self.machines.machines:
            return
        match victim:
            case "agent":
                self.machines.end_processes(machine)
            case "guestd":
                await self.machines.drop_streams()
            case _:
                await self.machines.kill(machine, why="struck")

    async def image_of(self, machine: str) -> str:
        """Return the image that a machine was made of."""
        return (await self.machines.get(machine)).spec.image

    def another_image(self, present: str) -> str:
        """Return the name of an image that is not this one; here any name is one."""
        return present + "+"

    def way_to(self, url: str) -> dict[str, Any]:
        """Return the agent's settings by which its $PAY leads to `url`."""
        return {"env": {"PAY": url}}

    async def entries(self, session: str, kind: str = "") -> list[Entry]:
        """Return the log, or one kind of it."""
        return [e for e in await self.log.read(session) if not kind or e.kind == kind]

    async def until(self, session: str, kind: str, *, count: int = 1, timeout_s: float = 20.0) -> Entry:
        """Wait until the log holds `count` entries of a kind and return the last of them."""
        deadline = self.clock.monotonic_s() + timeout_s
        while self.clock.monotonic_s() < deadline:
            row = await self.log.get(session)
            found = await self.entries(session, kind)
            if len(found) >= count:
                return found[count - 1]
            await self.log.wait(session, row.head, 0.5)
        raise AssertionError(f"no {kind} number {count} within {timeout_s} s:\n" + await self.describe(session))

    async def describe(self, session: str) -> str:
        """Return the session as text, for a failed test's message."""
        row = await self.log.get(session)
        lines = [f"{e.position:4} t{e.turn} {e.kind:16} {e.ref} {dict(e.body)}" for e in await self.entries(session)]
        return "\n".join([str(row), *lines, *self.machines.describe()])

    async def until_state(self, session: str, state: str, *, timeout_s: float = 20.0) -> None:
        """Wait until the session's row says this state and, for a frozen one, until its supervisor is gone."""
        async with asyncio.timeout(timeout_s):
            while (row := await self.log.get(session)).state != state:
                await self.log.wait(session, row.head, 0.05)
            if state in ("frozen", "cold"):
                await self.sessions.settled(session)

    async def say(self, session: str, text: str, *, turn: int) -> list[Entry]:
        """Send a message, wait for the end of the given turn, return the log."""
        await self.sessions.send(session, text, key=f"m{turn}")
        await self.until(session, "turn.end", count=turn)
        return await self.entries(session)


@asynccontextmanager
async def world(
    *,
    log: ContextLog | None = None,
    reopen: Callable[[], Awaitable[ContextLog]] | None = None,
    link: Callable[[Path], ProcessLink] = ProcessLink,
    make: Callable[[Path], Any] | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """Make a world in a temporary folder with a short path; everything it started is ended. `log`: memory by default.
    `make`: machines of another kind that has what tests use of `ProcessMachines` (`PlainHarness`)."""
    with tempfile.TemporaryDirectory(prefix="rcs", ignore_cleanup_errors=True) as folder:
        base = Settings(owner="server-1", agent_package=AGENT_PACKAGE, idle_timeout_s=0.2, hook_s=0.5, term_s=2.0,
                        rest_s=0.2, cancel_s=2.0)  # fmt: skip
        made = World(
            (make or partial(ProcessMachines, link=link))(Path(folder)),
            log or MemoryLog(),
            MemoryAgents(),
            replace(base, **settings),
            reopen,
        )
        try:
            yield made
        finally:
            with contextlib.suppress(Exception):
                await made.sessions.shutdown(detach=True)
            await made.machines.end()


def texts(entries: list[Entry]) -> list[str]:
    """Return the assistant's texts."""
    return [str(e.body["text"]) for e in entries if e.kind == "assistant"]


def kinds(entries: list[Entry]) -> list[str]:
    """Return the kinds in order."""
    return [e.kind for e in entries]


def notes(entries: list[Entry]) -> list[dict[str, Any]]:
    """Return the bodies of the notes."""
    return [dict(e.body) for e in entries if e.kind == "note"]


async def appears(path: Path) -> None:
    """Wait for a file that a process writes."""
    async with asyncio.timeout(20):
        while not path.exists():  # noqa: ASYNC110, ASYNC240 - another process writes it, there is no event to await
            await asyncio.sleep(0.01)


async def machine_of(w: World, session: str) -> str:
    """Return the id of a session's machine."""
    return str((await w.log.get(session)).meta["machine"])


async def deploy_coder(w: World, shared: Path, version: str, **config: Any) -> AgentVersion:
    """Deploy the test agent; its tools talk to the test through files in `shared`."""
    files = {"agent.py": coder(version)}
    return await w.sessions.deploy("coder", files, {"env": {"SHARED": str(shared)}, **config})


@asynccontextmanager
async def coder_world(shared: Path, **settings: Any) -> AsyncIterator[tuple[World, str]]:
    """Make a world with the test agent deployed and one session of it."""
    async with world(**settings) as made:
        await deploy_coder(made, shared, "1")
        yield made, (await made.sessions.start("coder")).id
