"""`Session`: what an agent's loop holds. Turns come in, replies and tool calls go to the log through the wire.

Rule of the house: what changes the world is announced in the log before it happens (`tool.start`) and reported after
(`tool.result`), and both are durable when the call returns. Memory needs no saving: the machine is frozen whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, Union

from recess_agent.app import Agent
from recess_agent.blobs import Blobs
from recess_agent.cancelling import Stop, TurnCancelled
from recess_agent.cut_replies import CutReply, Repair
from recess_agent.mirror import Mirror
from recess_agent.pump import DeltaPump
from recess_agent.running import Runs
from recess_agent.settled import Settled
from recess_agent.stream import Collector, Reply, unique_ids
from recess_agent.transcript import Message, to_openai
from recess_agent.waiting import RETRY_MOST_S, RETRY_S, Report, Waits, retry_delay
from recess_agent.wire import SessionClosed, Wire

SUSPEND_HOOK_S = 2.0
CUT_HOOK_S = 30.0

T = TypeVar("T")
Json = dict[str, Any]
FORMATS: Mapping[str, Callable[[Sequence[Message]], list[Message]]] = {"openai": to_openai, "neutral": list}
Source = Union[Awaitable[Any], AsyncIterator[Any]]  # noqa: UP007 - evaluated on Python 3.9


class Turn:
    """One user message and the work until its final answer. `continued` tells that an earlier attempt was cut off."""

    def __init__(self, data: Json) -> None:
        self.number = int(data["turn"])
        self.attempt = int(data.get("attempt", 1))
        self.position = int(data.get("position", 0))
        self.body: Json = dict(data.get("body") or {})
        self.text = str(self.body.get("text", ""))
        self.continued = self.attempt > 1
        self.stop = Stop()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop this turn: leave the loop's body soon, nothing more will be said in it."""
        return self.stop.asked


class Session:
    """The session of this process. Iterate over it for turns; see the methods for the rest."""

    def __init__(self, app: Agent, *, version: str = "", job: str = "", socket_path: str = "") -> None:
        self.id = ""
        self.name = ""
        self.epoch = 0
        self._app = app
        self._version = version
        self._job = job
        self._nonce = os.urandom(8).hex()
        self._serial = 0
        self._done = 0
        self._turn: Turn | None = None
        self._models = 0  # model calls at work
        self._parts = 0  # replies begun in this turn: the number of the next one, if the log does not know more
        self._shown = 0  # how far the turn's model has read the log
        self._waits: Waits | None = None
        self._runs: Runs | None = None
        self._mirror = Mirror()
        self._settled: dict[str, Settled] = {}  # the transcript of its entries, by format
        self._pumps: dict[int, DeltaPump] = {}  # of the replies that are being streamed, by part
        self._streams: Json = {}  # what the host has of them: part -> [pieces, checksum]
        self._hooks: set[asyncio.Future[None]] = set()
        self._wire = Wire(self._hello, self._pushed, socket_path=socket_path)
        self.blobs = Blobs(self._wire.request)

    # -- turns ---------------------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Turn]:
        """Yield turns; between two of them the whole machine may be frozen, for seconds or for months."""
        while True:
            try:
                data = await self._wire.request("next", done=self._done, shown=self._shown)
            except SessionClosed:
                return
            turn = self._turn = Turn(data)
            self._shown = self._parts = 0
            waits = self._waits = Waits(turn.number, self._wire.request, self._append, turn.stop)
            self._runs = Runs(turn.number, self._app.tools, self._append, waits, turn.stop, self.blobs)
            await self._runs.settle(data.get("pending") or [])
            for entry in self._mirror.cut_replies(turn.number) if turn.continued else ():
                await self._repair(str(entry["body"].get("text", "")), "crash", entry["position"])
            yield turn
            self.leave_turn()

    def leave_turn(self) -> None:
        """The runner's part: the turn at work is over, the next `next` says so."""
        if self._turn is not None:
            self._done = self._turn.number
        self._turn = self._waits = self._runs = None

    @property
    def turn(self) -> Turn:
        """The turn at work. Raises RuntimeError between turns."""
        if self._turn is None:
            raise RuntimeError("no turn is at work: write inside `async for turn in session`")
        return self._turn

    # -- what the model sees ---------------------------------------------------------------------------------------

    def messages(self, format: str = "openai") -> list[Json]:
        """Return the transcript so far, always valid: every tool call is followed by its outcome.

        `format` is "openai" (chat completions) or "neutral" ({role, text, tool_calls?, tool_call_id?}).
        """
        if format not in FORMATS:
            raise ValueError(f"format must be 'openai' or 'neutral', not {format!r}")
        self._shown = self._mirror.position
        return self._settled.setdefault(format, Settled(FORMATS[format])).messages(self._mirror.entries)

    @property
    def tools(self) -> list[Json]:
        """The agent's tools in the OpenAI function format."""
        return [one.schema() for one in self._app.tools.values()]

    @property
    def log(self) -> list[Json]:
        """The session's entries since the last compaction, as plain data; do not change them. The application's own are in today's
        shape (`Agent.upcast`); one that newer code wrote is as that wrote it, and has `newer`. Raises UpcastError."""
        return self._app.upcasters.read(self._mirror.entries)

    # -- what becomes durable ----------------------------------------------------------------------------------------

    async def stream(self, source: Source) -> Reply:
        """Stream a model's answer to whoever watches, and append it to the log as one durable entry.

        `source` is an awaitable (a whole answer) or an async iterator (chunks). If it raises, the text that came is
        kept as a partial reply and the exception goes on to you. In a turn that is cancelled you get what came so far,
        without tool calls, and `reply.cancelled`: a loop that runs until there are none then ends by itself.
        """
        turn, part = self.turn, self._take_part()
        collector = Collector()
        pump = self._pumps[part] = DeltaPump(self._wire.post, turn.number, part)
        self._at_model(1)
        try:
            turn.stop.check()  # a model that answers without a pause would win every race
            await turn.stop.race(_consume(source, collector, pump))
        except BaseException as exc:
            if collector.text and isinstance(exc, Exception):
                half: Json = {"text": collector.text, "tool_calls": [], "part": part, "partial": True}
                kept = await self._append("assistant", half)
                if not isinstance(exc, TurnCancelled):
                    await self._repair(collector.text, str(exc) or type(exc).__name__, int(kept["position"]))
            if isinstance(exc, TurnCancelled):
                return Reply(collector.text, cancelled=True)
            raise
        finally:
            self._at_model(-1)
            pump.close()
            del self._pumps[part]
            await _close(source)
        reply = collector.reply()
        reply.tool_calls = unique_ids(reply.tool_calls, self._mirror.call_ids())
        body: Json = {"text": reply.text, "tool_calls": [call.to_dict() for call in reply.tool_calls], "part": part}
        if reply.usage:
            body["usage"] = reply.usage
        if reply.model:
            body["model"] = reply.model
        await self._append("assistant", body)
        return reply

    async def say(self, text: str) -> None:
        """Append an answer that no model wrote."""
        part = self._take_part()
        await self._append("assistant", {"text": text, "tool_calls": [], "part": part})

    async def note(self, **data: Any) -> None:
        """Append data of the application's own; it is never shown to the model."""
        await self.record("note", data)

    async def record(self, kind: str, data: Json) -> None:
        """Append an entry of a kind of the application's own (`x.something`); see `recess_agent.records`. It has the newest
        schema that the agent knows of its kind (`Agent.upcast`)."""
        self._serial += 1
        schema = self._app.upcasters.newest(kind)
        await self._append(kind, data, serial=f"{self._nonce}.{self._serial}", schema=schema)

    def schema_of(self, kind: str) -> int:
        """Return the newest schema that the agent knows of a kind of the application's own."""
        return self._app.upcasters.newest(kind)

    @property
    def at_turn(self) -> Turn | None:
        """The turn at work, None between turns."""
        return self._turn

    async def compact(self, summary: str, *, to: int = 0) -> None:
        """Let `summary` stand, for the model, for everything before this turn (or up to position `to`, if that is
        earlier). Nothing is deleted: the log keeps it, forks and rewinds find it."""
        if not summary:
            raise ValueError("a compaction needs a summary")
        self._serial += 1
        await self._append("compact", {"summary": summary, "to": to}, serial=f"{self._nonce}.{self._serial}")

    async def run_tools(self, reply: Reply, *, parallel: bool = False) -> list[str]:
        """Run the calls of a reply and return their outputs in order. A tool's exception is its output, not yours.

        Each call is announced in the log before it runs and reported after; `parallel` runs them at once. Calls whose
        tool wants approval wait for a human first. In a turn that is cancelled the rest is not run.
        """
        runs = self._of_turn(self._runs)
        if not parallel:
            return [await runs.run(call) for call in reply.tool_calls]
        running = [asyncio.ensure_future(runs.run(call)) for call in reply.tool_calls]
        try:
            return list(await asyncio.gather(*running))
        finally:
            # One that raises (the log refused it), or a caller who is cancelled, leaves no sibling at work behind.
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    # -- waiting: the machine is put away meanwhile ------------------------------------------------------------------

    async def ask(
        self,
        text: str,
        choices: Sequence[str] = (),
        *,
        timeout: float | None = None,
        show: bool = False,
        ref: str = "",
    ) -> str | None:
        """Ask a human and return the answer, one of `choices` if there are any; None if none came within `timeout`
        seconds. `show`: the model sees the answer as a user message. A question is asked once: begun anew after a
        crash, a turn gets the answer that was given. Raises TurnCancelled."""
        return await self._of_turn(self._waits).ask(text, choices, timeout, show, ref)

    async def sleep(self, seconds: float, *, ref: str = "") -> None:
        """Wait, however long: for more than a minute the machine is put away. The time counts from the first attempt.
        Raises TurnCancelled."""
        await self._of_turn(self._waits).sleep(seconds, ref)

    async def retry_after(self, error: BaseException, *, default: float = RETRY_S, most: float = RETRY_MOST_S) -> None:
        """Sleep until the call that raised `error` may be made again; raises `error` itself if that is of no use.

        `error.retry_after` (seconds) says how long; without it, `default`. More than `most`, or `error.retryable` False,
        is of no use. So: `except ModelError as error: await session.retry_after(error)` in a loop around the one call.
        """
        await self.sleep(retry_delay(error, default, most))

    async def spawn(self, agent: str, text: str, *, ref: str = "") -> Report:
        """Start a session of another agent (or of this one) with a first message and wait for its report. The child is
        a session like any other and stays. Several at once: `asyncio.gather`. Raises TurnCancelled."""
        return await self._of_turn(self._waits).spawn(agent, text, ref)

    async def fork(self, text: str = "", *, name: str = "", ref: str = "") -> str:
        """Fork this session, conversation and machine together as they are now, and return the child's id at once. Both go
        on by themselves: the child has this turn's past but not its task, it begins with `text` or waits for a message.
        Begun anew after a crash, a turn finds the forks it made."""
        self.turn.stop.check()
        ref = ref or self._of_turn(self._waits).name("fork", text, name)
        asked = self._wire.request("fork", ref=ref, text=text, name=name, turn=self.turn.number)
        return str((await self.turn.stop.race(asked))["session"])

    @contextlib.asynccontextmanager
    async def hold(self, why: str = "") -> AsyncIterator[None]:
        """Keep the machine awake while background work goes on between turns."""
        self._serial += 1
        token = f"{self._nonce}.{self._serial}"
        await self._wire.request("hold", token=token, why=why)
        try:
            yield
        finally:
            await self._wire.request("release", token=token)

    async def _repair(self, text: str, why: str, position: int) -> None:
        """Ask the agent's hook what is to stand for a cut reply; one append, so that a crash leaves it asked or not."""
        cut = CutReply(text, why, self.turn.number, position)
        try:
            found = await asyncio.wait_for(self._app.run_hook("cut_reply", cut), CUT_HOOK_S)
        except Exception as exc:  # the user's code: its failure is told, and the reply stays as it is
            print(f"recess_agent: on_cut_reply hook failed: {exc!r}", flush=True)  # noqa: T201
            return
        if isinstance(found, Repair):
            body: Json = {"text": found.text, "tool_calls": [], "part": self._take_part(), "replaces": position}
            await self._append("assistant", {**body, "ask": found.ask} if found.ask else body)

    def _take_part(self) -> int:
        """Return the number of a reply that begins; two at once have two."""
        part = max(self._mirror.next_part(self.turn.number), self._parts)
        self._parts = part + 1
        return part

    def _at_model(self, change: int) -> None:
        """Tell the host when the first model call begins and the last one ends: beside one, a wait is no rest."""
        before, self._models = self._models, self._models + change
        if (before == 0) != (self._models == 0):
            self._wire.post({"t": "busy", "on": self._models > 0})

    # -- the runner's part -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and take the log. Raises SessionClosed."""
        await self._wire.start()

    async def crashed(self, detail: str) -> None:
        """Tell the host why this process is about to end."""
        await self._wire.request("crashed", detail=detail[-4000:])

    async def stop(self) -> None:
        """Disconnect."""
        await self._wire.stop()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _hello(self) -> Json:
        return {
            "version": self._version, "job": self._job, "pid": os.getpid(), "nonce": self._nonce,
            "position": self._mirror.position, "turn": self._turn.number if self._turn else 0, "done": self._done,
            "hooks": sorted(self._app.hooks), "busy": self._models > 0,
        }  # fmt: skip

    async def _pushed(self, message: Json) -> None:
        kind = message.get("t")
        if kind == "entries":
            for entry in message.get("entries") or []:
                self._mirror.add(entry)
        elif kind == "welcome":
            self.id, self.name = str(message.get("session", "")), str(message.get("name", ""))
            self.epoch = int(message.get("epoch", 0))
            self._streams = dict(message.get("streams") or {})
        elif kind == "ready":
            for part, pump in self._pumps.items():
                count, mark = self._streams.get(str(part)) or (0, 0)
                pump.go_on(int(count), int(mark))
        elif kind == "cancel":
            if self._turn is not None and self._turn.number == message.get("turn"):
                self._turn.stop.ask(str(message.get("why", "")))
        elif kind == "event":
            task = asyncio.ensure_future(self._hooked(str(message.get("event")), message))
            self._hooks.add(task)
            task.add_done_callback(self._hooks.discard)

    async def _hooked(self, name: str, message: Json) -> None:
        try:
            await asyncio.wait_for(self._app.run_hook(name, dict(message.get("info") or {})), SUSPEND_HOOK_S)
        except Exception as exc:  # a hook is the user's code: its failure is told, never fatal
            print(f"recess_agent: on_{name} hook failed: {exc!r}", flush=True)  # noqa: T201
        if "ack" in message:
            self._wire.post({"t": "ack", "ack": message["ack"]})

    async def _append(self, kind: str, body: Json, *, ref: str = "", serial: str = "", schema: int = 1) -> Json:
        turn = self._turn.number if self._turn else 0
        more = {"schema": schema} if schema != 1 else {}
        result = await self._wire.request("append", kind=kind, body=body, ref=ref, turn=turn, serial=serial, **more)
        entry = {
            "session": self.id,
            "position": result["position"],
            "kind": kind,
            "body": result.get("body", body),  # the host sets what only it can know
            "turn": turn,
            "ref": ref,
            **more,
        }
        self._mirror.add({**entry, "ts": result.get("ts", 0.0)})
        return result

    def _of_turn(self, part: T | None) -> T:
        if part is None:
            raise RuntimeError("no turn is at work: this belongs into `async for turn in session`")
        return part


async def _consume(source: Source, collector: Collector, pump: DeltaPump) -> None:
    """Feed all of a model's answer to the collector, and its text to those who watch."""
    if not hasattr(source, "__aiter__"):
        pump.feed(collector.feed(await source))
        return
    async for event in source:
        before = collector.restarts
        text = collector.feed(event)
        if collector.restarts != before:
            pump.restart()
        pump.feed(text)


async def _close(source: Source) -> None:
    """Close what was not used up: a model's connection is not left to the garbage collector."""
    if hasattr(source, "aclose"):
        await source.aclose()
    elif asyncio.iscoroutine(source):
        source.close()
