"""Tests of agents without machines, servers and providers: the real session runtime around your agent, in milliseconds.

    async with offline("agent.py", model=ScriptedModel(call("sh", cmd="ls"), "It is empty.")) as run:
        turn = await run.say("What is there?")
        assert (turn.text, turn.calls[0].name) == ("It is empty.", "sh")

Log, turns, effects, waits, crashes and upgrades are the product's own; the machine is a folder, the agent a task of the test's
process, the clock moves when it is told to, and the model says what the test wrote down. What is not there: memory that
comes back from a snapshot (a frozen agent's task simply waits; a fork has the files and the log), and any wall: tools run here.
docs/testing-agents.md is the guide.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recess.contextlog.contract import Entry
from recess.contextlog.transcript import messages
from recess.sessions.talking import Question
from recess.testing.scripted_model import KEY, Refuse, ScriptedModel, Step, call, calls
from recess.testing.session_world import AGENT_PACKAGE, World, world
from recess.testing.task_link import Borrowed, TaskLink, sdk

__all__ = ["Offline", "Refuse", "ScriptedModel", "Step", "ToolUse", "TurnResult", "call", "calls", "offline"]

TURN_S = 30.0  # of real time: a turn that has not ended by then hangs
NAME = "agent"
FROZEN_ON_DEMAND_S = 1e9


@dataclass(frozen=True)
class ToolUse:
    """A tool call of a turn. `outcome`: result | settled (by `verify`) | doubt | open."""

    name: str
    arguments: Mapping[str, Any]
    effect: str
    outcome: str
    output: str
    error: bool


@dataclass(frozen=True)
class TurnResult:
    """A turn that has ended. `status`: done | failed | cancelled. `text`: the last thing the agent said. `attempts`: more than
    one after a crash."""

    status: str
    text: str
    error: str
    calls: tuple[ToolUse, ...]
    attempts: int
    entries: tuple[Entry, ...]


class Offline:
    """One session of the agent under test. Times are of the fake clock unless a name says otherwise."""

    def __init__(self, made: World, session: str) -> None:
        self.world = made
        self.session = session

    # -- talking ---------------------------------------------------------------------------------------------------

    async def say(self, text: str) -> TurnResult:
        """Send a message and return its turn, ended. Raises AssertionError with the log if it does not end."""
        return await self.turn(await self.send(text))

    async def send(self, text: str, *, mode: str = "queue") -> int:
        """Send a message and return its position at once; `mode` as of `recess session send`."""
        return (await self.world.sessions.send(self.session, text, mode=mode)).position

    async def turn(self, position: int) -> TurnResult:
        """Wait for the end of the turn of the message at `position`, and return it."""
        found: TurnResult = await self._until(
            lambda log: _turn_of(log, position), f"the end of message {position}'s turn"
        )
        return found

    async def question(self) -> Question:
        """Wait until the agent asks a human (`Session.ask`, or a tool that needs approval), and return the question."""

        async def look() -> Question | None:
            return next(iter(await self.world.sessions.questions(self.session)), None)

        found: Question = await self._until_async(look, "a question")
        return found

    async def answer(self, text: str) -> None:
        """Answer the question that waits."""
        await self.world.sessions.answer(self.session, (await self.question()).ref, text)

    async def cancel(self, reason: str = "") -> None:
        """Stop the turn at work."""
        await self.world.sessions.cancel(self.session, reason=reason)

    async def seen(self, kind: str, *, count: int = 1) -> Entry:
        """Wait until the log holds `count` entries of a kind (`tool.start`, `timer` ...), and return the last of them."""

        def look(log: list[Entry]) -> Entry | None:
            found = [one for one in log if one.kind == kind]
            return found[count - 1] if len(found) >= count else None

        entry: Entry = await self._until(look, f"entry number {count} of kind {kind}")
        return entry

    # -- what happens to it ----------------------------------------------------------------------------------------

    async def pass_time(self, seconds: float) -> None:
        """Let this much time pass at once: times that the agent waits for come, an idle machine is put away."""
        self.world.clock.jump(seconds)

    async def freeze(self) -> None:
        """Put the session away now: hooks run, its machine is gone. The next message brings both back."""
        await self.world.sessions.suspend(self.session)

    async def kill_agent(self) -> None:
        """The agent's process dies where it waits at this moment. A turn that is open is settled and begun anew."""
        self.world.machines.machines[await self._machine()].link.signal_all(9)

    async def lose_machine(self) -> None:
        """The machine dies with all that is in memory; it comes back by its disk (rung 4) and the model is told."""
        await self.world.machines.kill(await self._machine(), why="the test ended it")

    async def restart_server(self) -> None:
        """The server is killed without a goodbye, and another one goes on with the log and the machine."""
        await self.world.crash_server()
        await self.world.sessions.recover()

    async def deploy(self, agent: str | Path | Mapping[str, str], **config: Any) -> str:
        """Deploy newer code and return its version; the session takes it by the agent's upgrade policy."""
        return (await self.world.sessions.deploy(NAME, _files(agent), config)).version

    # -- looking ---------------------------------------------------------------------------------------------------

    async def log(self, kind: str = "") -> list[Entry]:
        """Return the context log, or its entries of one kind."""
        return await self.world.entries(self.session, kind)

    async def transcript(self) -> list[dict[str, Any]]:
        """Return what the model would be shown now: {role, text, tool_calls?, tool_call_id?, note?}."""
        return messages(await self.log())

    async def folder(self) -> Path:
        """Return where the agent's working folder lies on this host."""
        return self.world.machines.machines[await self._machine()].link.path("/root")

    async def _machine(self) -> str:
        return str((await self.world.log.get(self.session)).meta.get("machine", ""))

    async def _until(self, look: Callable[[list[Entry]], Any], what: str) -> Any:
        async def looking() -> Any:
            return look(await self.log())

        return await self._until_async(looking, what)

    async def _until_async(self, look: Callable[[], Any], what: str) -> Any:
        try:
            async with asyncio.timeout(TURN_S):
                while True:
                    ticket = self.world.log.ticket(self.session)
                    found = await look()
                    if found is not None:
                        return found
                    row = await self.world.log.get(self.session)
                    await self.world.log.wait(self.session, row.head, TURN_S, ticket=ticket)
        except TimeoutError:
            told = await self.world.describe(self.session)
            raise AssertionError(f"{what}: not within {TURN_S:.0f} s\n{told}") from None


@asynccontextmanager
async def offline(
    agent: str | Path | Mapping[str, str],
    model: ScriptedModel | None = None,
    *,
    env: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> AsyncIterator[Offline]:
    """Run a session of an agent: a path of its file, or its files by path (`agent.py` is the entry). Several sessions in one
    process come after each other, not at the same time.

    `model` is what OPENAI_BASE_URL points to; without one, and without a client of your own, the first model call fails.
    `env` is the agent's, `config` what `recess deploy` would be given. While it runs, the working folder of this process is
    the agent's; afterwards folder, environment, import path and modules are as before.
    """
    model = model or ScriptedModel()
    files = _files(agent)  # before the working folder is another
    async with model:
        load = sdk(AGENT_PACKAGE)
        borrowed: list[Borrowed] = []

        def link(folder: Path) -> TaskLink:
            if not borrowed:
                borrowed.append(Borrowed(folder.parent))
            return TaskLink(folder, borrowed[0], load)

        try:
            async with world(
                link=link, idle_timeout_s=FROZEN_ON_DEMAND_S, rest_s=FROZEN_ON_DEMAND_S, term_s=1.0, cancel_s=2.0
            ) as made:
                given = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": KEY, **(env or {})}
                await made.sessions.deploy(NAME, files, {**(config or {}), "env": given})
                yield Offline(made, (await made.sessions.start(NAME)).id)
        finally:
            for one in borrowed:
                one.give_back()


def _files(agent: str | Path | Mapping[str, str]) -> dict[str, str | bytes]:
    """Return an agent's files. A path brings the file as `agent.py`, and the Python files beside it."""
    if isinstance(agent, Mapping):
        return dict(agent)
    entry = Path(agent)
    beside = {
        one.name: one.read_bytes() for one in sorted(entry.parent.glob("*.py")) if not one.name.startswith("test_")
    }
    beside.pop("conftest.py", None)
    return {**beside, "agent.py": entry.read_bytes()}


def _turn_of(log: list[Entry], position: int) -> TurnResult | None:
    """Return the turn of a message if it has ended."""
    starts = [one for one in log if one.kind == "turn.start" and one.body.get("inbox") == position]
    turn = starts[0].turn if starts else 0
    mine = tuple(one for one in log if turn and one.turn == turn)
    end = next((one for one in mine if one.kind == "turn.end"), None)
    if end is None:
        return None
    said = [str(one.body.get("text", "")) for one in mine if one.kind == "assistant"]
    used = tuple(_use(one, mine) for one in mine if one.kind == "tool.start")
    error = str(end.body.get("error", ""))
    return TurnResult(str(end.body["status"]), said[-1] if said else "", error, used, len(starts), mine)


def _use(start: Entry, turn: tuple[Entry, ...]) -> ToolUse:
    kinds = ("tool.result", "tool.settled", "tool.doubt")
    end = next((one for one in turn if one.kind in kinds and one.ref == start.ref), None)
    body = end.body if end is not None else {}
    return ToolUse(
        str(start.body["name"]), dict(start.body.get("arguments") or {}), str(start.body.get("effect", "")),
        end.kind.removeprefix("tool.") if end is not None else "open",
        str(body.get("output", body.get("reason", ""))), bool(body.get("error")),
    )  # fmt: skip
