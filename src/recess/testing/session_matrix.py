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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recess import crashpoints
from recess.contextlog import SCHEMA, DirectoryBodies, SqlLog
from recess.contextlog.branch import on_branch
from recess.contextlog.contract import ContextLog, Entry
from recess.contextlog.transcript import check_transcript, messages
from recess.db import Database
from recess.testing.http_server import HttpRequest, HttpResponse
from recess.testing.payment_server import PaymentServer
from recess.testing.plain_harness import PlainHarness
from recess.testing.session_agents import matrix_agent
from recess.testing.session_world import World, machine_of, world

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


class CountingPayments(PaymentServer):
    """The provider, which also remembers every POST's key in order."""

    def __init__(self) -> None:
        super().__init__("k")
        self.asked: list[str] = []

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Count, then serve."""
        if request.method == "POST":
            self.asked.append(request.headers.get("idempotency-key", ""))
        return await super().answer(request)


@dataclass
class Account:
    """What was promised, and whether the log and the payment provider agree. `said`: text -> acknowledged position."""

    said: dict[str, int] = field(default_factory=dict)
    strikes: list[str] = field(default_factory=list)

    def check(self, entries: list[Entry], pay: CountingPayments, journal: list[str]) -> None:
        """Raise AssertionError with what does not add up."""
        branch = on_branch(entries)
        wrong = check_transcript(messages(entries))
        assert not wrong, f"the transcript is invalid: {wrong}"
        positions = [e.position for e in entries]
        assert positions == list(range(1, len(entries) + 1)), "positions with gaps"
        self._messages(branch, hidden=set(positions) - {e.position for e in branch})
        self._charges(branch, pay)
        self._losses(branch, journal)

    def _messages(self, branch: list[Entry], *, hidden: set[int]) -> None:
        """`hidden`: positions that a rewind took off the branch; nothing else excuses a message that is not there."""
        users = [e for e in branch if e.kind == "user"]
        wanted = {text: at for text, at in self.said.items() if at not in hidden}
        assert {str(e.body["text"]): e.position for e in users} == wanted, "an acknowledged message is lost or doubled"
        turns: dict[int, set[int]] = {}
        for e in branch:
            if e.kind == "turn.start":
                turns.setdefault(int(e.body["inbox"]), set()).add(e.turn)
        ends = [e.turn for e in branch if e.kind == "turn.end"]
        assert len(ends) == len(set(ends)), "a turn has ended twice"
        for user in users:
            mine = turns.get(user.position, set())
            assert len(mine) == 1, f"message {user.position} has the turns {sorted(mine)}"
            assert mine <= set(ends), f"the turn of message {user.position} has not ended"

    def _charges(self, branch: list[Entry], pay: CountingPayments) -> None:
        for text in self.said:
            word, cents = text.split()[0], int(text.rsplit("#", 1)[1]) + 1
            asked = [key for key in pay.asked if pay.charges[key].cents == cents]
            if word in ("charge", "wire"):
                assert len(asked) <= 1, f"`once` ran {len(asked)} times: {text}"
            assert len(set(asked)) <= 1, f"one call, several keys: {text}"
        started = {e.ref: e for e in branch if e.kind == "tool.start"}
        outcomes: dict[str, list[Entry]] = {ref: [] for ref in started}
        for e in branch:
            if e.kind in ("tool.result", "tool.settled", "tool.doubt") and e.ref in outcomes:
                outcomes[e.ref].append(e)
        for ref, found in outcomes.items():
            name = started[ref].body["name"]
            assert len(found) == 1, f"call {ref} ({name}) has the outcomes {[e.kind for e in found]}"
            if name == "charge" and not found[0].body.get("error"):
                assert found[0].kind != "tool.doubt", "`verify` can tell, so there is no doubt"
                cents = started[ref].body["arguments"]["cents"]
                assert any(one.cents == cents for one in pay.charges.values()), (
                    f"charge {cents} is claimed and not made"
                )

    def _losses(self, branch: list[Entry], journal: list[str]) -> None:
        """A file that the log says was written is there, or a later `machine.restore` says that files are lost."""
        names = {e.ref: str(e.body["arguments"]["name"]) for e in branch if _is_work(e)}
        done = {e.ref: e.position for e in branch if e.kind == "tool.result" and not e.body.get("error")}
        restores = [e for e in branch if e.kind == "machine.restore"]
        for e in restores:
            assert e.body["rung"] in (1, 2, 4, 5)
            assert e.body["why"], f"no reason at {e.position}"
            assert bool(e.body.get("lost")) == (bool(e.body["stale"]) or e.body["rung"] == 4), e.body
        for ref, name in names.items():
            if ref in done and name not in journal:
                told = [e for e in restores if e.position > done[ref] and "files" in str(e.body.get("lost", ""))]
                assert told, f"the file of {name} is gone and nobody was told"


def _is_work(entry: Entry) -> bool:
    return entry.kind == "tool.start" and entry.body["name"] == "work"


class Round:
    """One session's life under fire. `strike_all` is the whole round; raises AssertionError with the log's text."""

    def __init__(self, w: World, shared: Path, pay: CountingPayments, seed: int, *, plain: bool = False) -> None:
        self.w = w
        self.shared = shared
        self.pay = pay
        self.draw = random.Random(seed)
        self.account = Account()
        self.session = ""
        self._count = 0
        self._version = 1
        self._image = "base"
        self._plain = plain

    async def strike_all(self) -> Account:
        """Every point once, in the seed's order."""
        await self._deploy()
        self.session = (await self.w.sessions.start("me")).id
        points = [one for one in HOST_POINTS if not (self._plain and one in REBOOT)]  # it has no image to boot
        steps: list[tuple[str, Callable[[], Awaitable[None]]]] = [(p, self._step_of(p)) for p in points]
        steps += [(f"{p}/{v}", self._in_guest(p, v)) for p in GUEST_POINTS for v in self.draw.sample(VICTIMS, 2)]
        self.draw.shuffle(steps)
        for name, step in steps:
            self.account.strikes.append(name)
            try:
                async with asyncio.timeout(STEP_S):
                    await step()
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

    def _step_of(self, point: str) -> Callable[[], Awaitable[None]]:
        steps = {
            **dict.fromkeys(UPGRADE, self._upgrade), **dict.fromkeys(FORK, self._fork),
            **dict.fromkeys(WAIT, self._ask), **dict.fromkeys(CHILD, self._spawn),
            **dict.fromkeys(REBOOT, self._reimage),
            "session.after_settle": self._settle, "session.after_rewind": self._rewind,
            "session.before_cancel": self._cancel,
        }  # fmt: skip
        step = steps.get(point, self._turn)
        return lambda: step(point)

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
        self._image = f"image-{self._version}"
        await self._upgrade(point)
        machine = await self.w.machines.get(await machine_of(self.w, self.session))
        assert machine.spec.image == self._image, "newer code asked for another image"

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
        self.w.new_server()
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

    def _in_guest(self, point: str, victim: str) -> Callable[[], Awaitable[None]]:
        async def step() -> None:
            self._arm_guest(point)
            position = await self._say(self.draw.choice(TOOLS))
            await self._hit(point)
            await self._strike(victim)
            self._go(point)
            await self._ended(position)

        return step

    # -- the fire --------------------------------------------------------------------------------------------------

    async def _strike(self, victim: str) -> None:
        machine = self.w.machines.machines[await machine_of(self.w, self.session)]
        match victim:
            case "agent":
                self.w.machines.end_processes(machine.row.id)
            case "guestd":
                await self.w.machines.drop_streams()
            case "machine":
                await self.w.machines.kill(machine.row.id, why="struck")
            case "server":
                await self.w.crash_server()
                await self.w.sessions.recover()
            case _:
                await self.w.sessions.abandon()
                await self.w.machines.kill(machine.row.id, why="struck")
                if victim == "server+machine":
                    await self.w.crash_server()
                    await self.w.sessions.recover()

    async def _crash_at(self, point: str, *, machine: bool = True) -> None:
        """Wait until the armed point was passed, then lose the server, and by the draw its machine; start the next."""
        while crashpoints.is_armed(point):  # noqa: ASYNC110 - a crash rings no bell
            await asyncio.sleep(0.005)
        ident = str((await self.w.log.get(self.session)).meta.get("machine", ""))
        await self.w.sessions.abandon()
        if machine and ident in self.w.machines.machines and self.draw.random() < 0.4:
            await self.w.machines.kill(ident, why="struck")
        await self.w.crash_server()
        await self.w.sessions.recover()

    def _arm_guest(self, point: str) -> None:
        for old in ("hit", "go"):
            (self.shared / f"{old}-{point}").unlink(missing_ok=True)
        (self.shared / f"arm-{point}").touch()

    def _go(self, point: str) -> None:
        (self.shared / f"go-{point}").touch()

    async def _hit(self, point: str) -> None:
        while not (self.shared / f"hit-{point}").exists():  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.005)

    # -- the life --------------------------------------------------------------------------------------------------

    async def _deploy(self) -> None:
        self._version += 1
        env = {"SHARED": str(self.shared), "PAY": self.pay.url}
        config: dict[str, Any] = {"env": env, "image": self._image}
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
        row = await self.w.log.get(self.session)
        folder = self.w.machines.machines.get(str(row.meta.get("machine", "")))
        journal = folder.link.path("/root") / "journal" if folder is not None else None
        lines = journal.read_text().split() if journal is not None and journal.exists() else []
        self.account.check(await read_all(self.w.log, self.session), self.pay, lines)


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
    shared = folder / "shared"
    shared.mkdir()
    async with CountingPayments() as pay, stored(store, folder, database=database, cancel_s=0.3, term_s=0.3) as w:
        return await Round(w, shared, pay, seed, plain=store == "plain").strike_all()
