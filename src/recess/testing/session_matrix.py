"""The crash matrix: one session's whole life, struck at every named point, and an account of what must hold afterwards.

A round takes one session (real agent processes, a real payment provider, the memory log, SQLite or Postgres) through every crash
point of the sessions room and every moment of a turn inside the machine, in an order drawn from a seed, with a victim
drawn for each: the agent's process, the guest's channel, the VM, the server, both at once. `Account` then adds up: every
acknowledged message in exactly one turn, `once` charged at most once, the transcript valid, the rung and the loss told.
It must know nothing of pytest: `make soak` runs many rounds, the tests one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from recess import crashpoints
from recess.contextlog import SCHEMA, DirectoryBodies, SqlLog
from recess.contextlog.contract import ContextLog, Entry
from recess.contextlog.transcript import check_transcript, messages
from recess.db import Database
from recess.sessions.service import Sessions
from recess.testing.plain_harness import PlainHarness
from recess.testing.session_account import Account, CountingPayments
from recess.testing.session_agents import matrix_agent
from recess.testing.session_world import World, world

# plain: the product's own plain machines, over SQLite; postgres: an empty database of a server that whoever runs the round has
STORES = ("memory", "sqlite", "postgres", "plain")
STEP_S = 30.0

# Points that every turn with a tool call, a freeze and a thaw passes.
LIFE = (
    "session.before_append", "session.after_turn_start", "session.after_assistant", "session.after_tool_start",
    "session.after_tool_result", "session.after_turn_end", "session.after_thaw", "session.after_restore",
    "session.before_freeze", "session.after_snapshot", "session.after_freeze",
)  # fmt: skip
UPGRADE = ("session.after_code", "session.before_upgrade", "session.after_upgrade_stop")
FORK = ("session.after_live_snapshot", "session.after_fork")
WAIT = ("session.after_ask", "session.after_timer")
CHILD = ("session.after_spawn", "session.before_report", "session.after_report")
REBOOT = ("session.after_reboot",)
OTHER = ("session.after_settle", "session.after_rewind", "session.before_cancel")
HOST_POINTS = (*LIFE, *UPGRADE, *FORK, *WAIT, *CHILD, *REBOOT, *OTHER)

GUEST_POINTS = ("model.before", "model.middle", "model.after", "tool.before", "tool.after")
VICTIMS = ("agent", "guestd", "machine", "server", "server+machine")
TOOLS = ("charge", "wire", "order", "look", "work")  # once with verify, once without, keyed, pure, local


class Struck(Protocol):
    """The runtime that is struck: `World`, or `recess.testing.session_real.RealWorld`, whose machines are real."""

    @property
    def sessions(self) -> Sessions:
        """Those of the server of now."""
        ...

    @property
    def log(self) -> ContextLog:
        """The log as it sees it."""
        ...

    async def strike(self, machine: str, victim: str) -> None:
        """Take away the agent's process, the guest's channel ("guestd": on a real machine the guest with it) or the machine."""
        ...

    async def crash_server(self) -> Sessions:
        """Lose the server without a word; return the next one."""
        ...

    async def until_state(self, session: str, state: str) -> None:
        """Wait until the session's row says so and nobody drives it."""
        ...

    async def describe(self, session: str) -> str:
        """Return all there is to know, as text."""
        ...

    async def image_of(self, machine: str) -> str:
        """Return the image that a machine was made of."""
        ...

    def another_image(self, present: str) -> str:
        """Return the name of an image that is not this one."""
        ...

    def way_to(self, url: str) -> dict[str, Any]:
        """Return the agent's settings by which its $PAY leads to `url`."""
        ...


def all_strikes(draw: random.Random, *, images: bool = True) -> list[str]:
    """Return the names of a whole round's strikes, in no order: each point of the host, and each moment inside with two victims."""
    points = [one for one in HOST_POINTS if images or one not in REBOOT]
    return points + [f"{point}/{victim}" for point in GUEST_POINTS for victim in draw.sample(VICTIMS, 2)]


class Round:
    """One session's life under fire. `strike_all` is the whole round; raises AssertionError with the log's text. `step_s`: how
    long one strike and what comes of it may take."""

    def __init__(
        self, w: Struck, pay: CountingPayments, seed: int, *, plain: bool = False, step_s: float = STEP_S
    ) -> None:
        self.w = w
        self.pay = pay
        self._step_s = step_s
        self.draw = random.Random(seed)
        self.account = Account()
        self.session = ""
        self._count = 0
        self._version = 1
        self._image = "base"
        self._plain = plain

    async def strike_all(self, names: Sequence[str] = ()) -> Account:
        """These strikes, by default all, in the seed's order."""
        await self._deploy()
        self.session = (await self.w.sessions.start("me")).id
        wanted = list(names) or all_strikes(self.draw, images=not self._plain)
        self.draw.shuffle(wanted)
        for name in wanted:
            self.account.strikes.append(name)
            try:
                async with asyncio.timeout(self._step_s):
                    await self._step_of(name)
                await self._check()
            except (AssertionError, TimeoutError) as exc:
                told = "\n".join(
                    [f"{name}: {exc!r}", f"after {self.account.strikes}", await self.w.describe(self.session)]
                )
                raise AssertionError(told) from exc
            finally:
                crashpoints.disarm_all()
        return self.account

    # -- the steps -------------------------------------------------------------------------------------------------

    def _step_of(self, name: str) -> Awaitable[None]:
        point, _, victim = name.partition("/")
        if victim:
            return self._in_guest(point, victim)
        steps = {
            **dict.fromkeys(UPGRADE, self._upgrade), **dict.fromkeys(FORK, self._fork),
            **dict.fromkeys(WAIT, self._ask), **dict.fromkeys(CHILD, self._spawn),
            **dict.fromkeys(REBOOT, self._reimage),
            "session.after_settle": self._settle, "session.after_rewind": self._rewind,
            "session.before_cancel": self._cancel,
        }  # fmt: skip
        return steps.get(point, self._turn)(point)

    async def _turn(self, point: str) -> None:
        live = (await self.w.log.get(self.session)).state in ("running", "parked")
        if live and point in ("session.after_thaw", "session.after_restore"):
            await self.w.until_state(self.session, "frozen")
        crashpoints.arm(point)
        position = await self._say(self.draw.choice(TOOLS))
        await self._crash_at(point)
        await self._ended(position)

    async def _upgrade(self, point: str) -> None:
        crashpoints.arm(point)
        await self._deploy()
        position = await self._say("look")
        await self._crash_at(point)
        await self._ended(position)

    async def _reimage(self, point: str) -> None:
        self._image = self.w.another_image(self._image)
        await self._upgrade(point)
        assert await self.w.image_of(await self._machine()) == self._image, "newer code asked for another image"

    async def _ask(self, point: str) -> None:
        crashpoints.arm(point)
        position = await self._say("ask")
        await self._crash_at(point)
        while not (found := await self.w.sessions.questions(self.session)):
            await self._change()
        await self.w.sessions.answer(self.session, found[0].ref, "yes")
        await self._ended(position)

    async def _spawn(self, point: str) -> None:
        crashpoints.arm(point)
        position = await self._say("spawn")
        await self._crash_at(point)
        await self._ended(position)

    async def _cancel(self, point: str) -> None:
        self._arm_guest("stuck")
        position = await self._say("stuck")
        await self._hit("stuck")
        crashpoints.arm(point)
        await self.w.sessions.cancel(self.session)
        await self._crash_at(point, machine=False)
        self._go("stuck")
        assert await self._ended(position) == "cancelled"

    async def _settle(self, point: str) -> None:
        self._arm_guest("tool.after")
        position = await self._say(self.draw.choice(TOOLS))
        await self._hit("tool.after")
        await self._strike("machine+down")
        crashpoints.arm(point)
        self._go("tool.after")
        await self.w.crash_server()
        await self.w.sessions.recover()
        await self._crash_at(point)
        await self._ended(position)

    async def _fork(self, point: str) -> None:
        self._arm_guest("tool.before")
        position = await self._say("work")
        await self._hit("tool.before")
        crashpoints.arm(point)
        fork = asyncio.create_task(self.w.sessions.fork(self.session))
        await self._crash_at(point, machine=False)
        fork.cancel()
        await asyncio.gather(fork, return_exceptions=True)
        self._go("tool.before")
        await self._ended(position)
        child = await self.w.sessions.fork(self.session)
        sent = await self.w.sessions.send(child.id, "look #0", key="child")
        await self._ended(sent.position, session=child.id)
        assert not check_transcript(messages(await read_all(self.w.log, child.id)))
        await self.w.sessions.close(child.id)

    async def _rewind(self, point: str) -> None:
        mark = (await self.w.log.get(self.session)).head
        await self._ended(await self._say("look"))
        crashpoints.arm(point)
        with contextlib.suppress(crashpoints.Crashed):
            await self.w.sessions.rewind(self.session, to=mark)
        await self._crash_at(point)
        row = await self.w.log.get(self.session)
        if not any(e.kind == "rewind" and e.body["to"] == mark for e in await read_all(self.w.log, row.id, mark)):
            await self.w.sessions.rewind(self.session, to=mark)
        await self._ended(await self._say("look"))

    async def _in_guest(self, point: str, victim: str) -> None:
        self._arm_guest(point)
        position = await self._say(self.draw.choice(TOOLS))
        await self._hit(point)
        await self._strike(victim)
        self._go(point)
        await self._ended(position)

    # -- the fire --------------------------------------------------------------------------------------------------

    async def _strike(self, victim: str) -> None:
        machine = await self._machine()
        if victim in ("agent", "guestd", "machine"):
            await self.w.strike(machine, victim)
            return
        if victim != "server":
            await self.w.sessions.abandon()
            await self.w.strike(machine, "machine")
        if victim != "machine+down":
            await self.w.crash_server()
            await self.w.sessions.recover()

    async def _crash_at(self, point: str, *, machine: bool = True) -> None:
        """Wait until the armed point was passed, then lose the server, and by the draw its machine; start the next."""
        while crashpoints.is_armed(point):  # noqa: ASYNC110 - a crash rings no bell
            await asyncio.sleep(0.005)
        ident = await self._machine()
        await self.w.sessions.abandon()
        if machine and ident and self.draw.random() < 0.4:
            await self.w.strike(ident, "machine")
        await self.w.crash_server()
        await self.w.sessions.recover()

    async def _machine(self) -> str:
        return str((await self.w.log.get(self.session)).meta.get("machine", ""))

    def _arm_guest(self, point: str) -> None:
        self.pay.marks.arm(point)

    def _go(self, point: str) -> None:
        self.pay.marks.go(point)

    async def _hit(self, point: str) -> None:
        await self.pay.marks.hit(point)

    # -- the life --------------------------------------------------------------------------------------------------

    async def _deploy(self) -> None:
        self._version += 1
        config = {**self.w.way_to(self.pay.url), "image": self._image}
        if self._plain:
            config["backend"] = "process"
        await self.w.sessions.deploy("me", {"agent.py": matrix_agent(str(self._version))}, config)

    async def _say(self, word: str) -> int:
        """Send a message; from its acknowledgement on it must not be lost. Sent twice, as a client that lost the answer does."""
        self._count += 1
        text = f"{word} #{self._count}"
        done = await self.w.sessions.send(self.session, text, key=text)
        assert (await self.w.sessions.send(self.session, text, key=text)).position == done.position
        self.account.said[text] = done.position
        return done.position

    async def _ended(self, position: int, *, session: str = "") -> str:
        """Wait for the end of the turn of the message at `position`; return its status."""
        session = session or self.session
        while True:
            entries = await read_all(self.w.log, session, position)
            turns = {e.turn for e in entries if e.kind == "turn.start" and e.body.get("inbox") == position}
            ends = [e for e in entries if e.kind == "turn.end" and e.turn in turns]
            if ends:
                return str(ends[0].body["status"])
            await self._change(session)

    async def _change(self, session: str = "") -> None:
        session = session or self.session
        await self.w.log.wait(session, (await self.w.log.get(session)).head, 0.2)

    async def _check(self) -> None:
        self.account.check(await read_all(self.w.log, self.session), self.pay)


async def read_all(log: ContextLog, session: str, after: int = 0) -> list[Entry]:
    """Return a log of any length, page by page."""
    entries: list[Entry] = []
    while page := await log.read(session, after=entries[-1].position if entries else after, limit=1000):
        entries += page
    return entries


@asynccontextmanager
async def stored(store: str, folder: Path, *, database: str = "", **settings: Any) -> AsyncIterator[World]:
    """Make a world over a log of this kind (`database`: the address for "postgres"); a crashed server's successor opens the
    database anew."""
    if store == "memory":
        async with world(**settings) as w:
            yield w
        return
    opened: list[Database] = []

    async def reopen() -> ContextLog:
        if opened:
            await opened.pop().close()
        opened.append(Database.open(database if store == "postgres" else folder / "log.db", [SCHEMA]))
        return SqlLog(opened[0], DirectoryBodies(folder / "bodies"))

    try:
        make = PlainHarness if store == "plain" else None
        async with world(log=await reopen(), reopen=reopen, make=make, **settings) as w:
            yield w
    finally:
        await opened.pop().close()


async def crash_round(store: str, seed: int, folder: Path, *, database: str = "") -> Account:
    """Run one round in `folder` (scratch, empty), for "postgres" in this empty `database`. Raises AssertionError if anything does
    not add up."""
    async with CountingPayments() as pay, stored(store, folder, database=database, cancel_s=0.3, term_s=0.3) as w:
        return await Round(w, pay, seed, plain=store == "plain").strike_all()
