"""`Session`: what an agent's loop holds. Turns come in, replies and tool calls go to the log through the wire.

Rule of the house: what changes the world is announced in the log before it happens (`tool.start`) and reported after
(`tool.result`), and both are durable when the call returns. Memory needs no saving: the machine is frozen whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Union

from recess_agent.app import Agent
from recess_agent.mirror import Mirror
from recess_agent.stream import Collector, Reply, ToolCall, unique_ids
from recess_agent.tools import Call, Tool, render
from recess_agent.transcript import messages, to_openai
from recess_agent.wire import SessionClosed, Wire

DELTA_S = 0.05
DELTA_CHARS = 1024
OUTPUT_CHARS_MAX = 1024 * 1024
SUSPEND_HOOK_S = 2.0

Json = dict[str, Any]
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
        self._mirror = Mirror()
        self._hooks: set[asyncio.Future[None]] = set()
        self._wire = Wire(self._hello, self._pushed, socket_path=socket_path)

    # -- turns ---------------------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Turn]:
        """Yield turns; between two of them the whole machine may be frozen, for seconds or for months."""
        while True:
            try:
                data = await self._wire.request("next", done=self._done)
            except SessionClosed:
                return
            self._turn = Turn(data)
            await self._settle_pending(data.get("pending") or [])
            yield self._turn
            self._done = self._turn.number
            self._turn = None

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
        neutral = messages(self._mirror.entries)
        if format == "neutral":
            return neutral
        if format == "openai":
            return to_openai(neutral)
        raise ValueError(f"format must be 'openai' or 'neutral', not {format!r}")

    @property
    def tools(self) -> list[Json]:
        """The agent's tools in the OpenAI function format."""
        return [one.schema() for one in self._app.tools.values()]

    @property
    def log(self) -> list[Json]:
        """The session's entries since the last compaction, as plain data; do not change them."""
        return list(self._mirror.entries)

    # -- what becomes durable ----------------------------------------------------------------------------------------

    async def stream(self, source: Source) -> Reply:
        """Stream a model's answer to whoever watches, and append it to the log as one durable entry.

        `source` is an awaitable (a whole answer) or an async iterator (chunks). If it raises, the text that came is
        kept as a partial reply and the exception goes on to you.
        """
        turn, part = self.turn.number, self._mirror.next_part(self.turn.number)
        collector = Collector()
        pump = _DeltaPump(self._wire, turn, part)
        restarts = 0
        try:
            if hasattr(source, "__aiter__"):
                async for event in source:
                    text, before = collector.feed(event), restarts
                    restarts = collector.restarts
                    if restarts != before:
                        pump.restart()
                    pump.feed(text)
            else:
                pump.feed(collector.feed(await source))
        except BaseException as exc:
            if collector.text and isinstance(exc, Exception):
                await self._append(
                    "assistant", {"text": collector.text, "tool_calls": [], "part": part, "partial": True}
                )
            raise
        finally:
            pump.close()
            if hasattr(source, "aclose"):
                await source.aclose()  # a model's connection is not left to the garbage collector
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
        part = self._mirror.next_part(self.turn.number)
        await self._append("assistant", {"text": text, "tool_calls": [], "part": part})

    async def note(self, **data: Any) -> None:
        """Append data of the application's own; it is never shown to the model."""
        self._serial += 1
        await self._append("note", data, serial=f"{self._nonce}.{self._serial}")

    async def run_tools(self, reply: Reply, *, parallel: bool = False) -> list[str]:
        """Run the calls of a reply and return their outputs in order. A tool's exception is its output, not yours.

        Each call is announced in the log before it runs and reported after; `parallel` runs them at once.
        """
        if parallel:
            return list(await asyncio.gather(*(self._run_tool(call) for call in reply.tool_calls)))
        return [await self._run_tool(call) for call in reply.tool_calls]

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
            "hooks": sorted(self._app.hooks),
        }  # fmt: skip

    async def _pushed(self, message: Json) -> None:
        kind = message.get("t")
        if kind == "entries":
            for entry in message.get("entries") or []:
                self._mirror.add(entry)
        elif kind == "welcome":
            self.id, self.name = str(message.get("session", "")), str(message.get("name", ""))
            self.epoch = int(message.get("epoch", 0))
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

    async def _append(self, kind: str, body: Json, *, ref: str = "", serial: str = "") -> Json:
        turn = self._turn.number if self._turn else 0
        result = await self._wire.request("append", kind=kind, body=body, ref=ref, turn=turn, serial=serial)
        entry = {
            "session": self.id,
            "position": result["position"],
            "kind": kind,
            "body": body,
            "turn": turn,
            "ref": ref,
        }
        self._mirror.add({**entry, "ts": result.get("ts", 0.0)})
        return result

    async def _run_tool(self, wanted: ToolCall) -> str:
        tool = self._app.tools.get(wanted.name)
        if tool is None:
            return await self._result(wanted.id, f"there is no tool named {wanted.name!r}", error=True)
        if not isinstance(wanted.arguments, dict):
            return await self._result(wanted.id, f"the arguments are not a JSON object: {wanted.arguments}", error=True)
        body = {
            "name": tool.name, "arguments": wanted.arguments, "effect": tool.effect, "verify": tool.verify is not None,
        }  # fmt: skip
        started = await self._append("tool.start", body, ref=wanted.id)
        return await self._call(
            tool, Call(wanted.id, tool.name, wanted.arguments, str(started.get("key", "")), self.turn.number)
        )

    async def _call(self, tool: Tool, call: Call) -> str:
        try:
            output, error = render(await tool.run(call)), False
        except Exception as exc:  # the tool's failure is the model's to handle
            output, error = f"{type(exc).__name__}: {exc}", True
        return await self._result(call.id, output, error=error)

    async def _result(self, call_id: str, output: str, *, error: bool = False) -> str:
        if len(output) > OUTPUT_CHARS_MAX:
            dropped = len(output) - OUTPUT_CHARS_MAX
            output = output[:OUTPUT_CHARS_MAX] + f"\n[recess] {dropped} more characters were dropped"
        body: Json = {"output": output}
        if error:
            body["error"] = True
        await self._append("tool.result", body, ref=call_id)
        return output

    async def _settle_pending(self, pending: list[Json]) -> None:
        """End the calls that a crash left open, before the turn goes on: ask `verify`, or run again where that is safe."""
        for one in pending:
            tool = self._app.tools.get(str(one.get("name")))
            call = Call(
                str(one["call_id"]),
                str(one.get("name")),
                dict(one.get("arguments") or {}),
                str(one.get("key", "")),
                self.turn.number,
            )
            if tool is None:
                await self._append(
                    "tool.doubt", {"name": call.name, "reason": "this version has no such tool"}, ref=call.id
                )
            elif tool.effect in ("pure", "keyed"):
                await self._call(tool, call)
            elif tool.verify is not None:
                await self._verify(tool, call)
            else:
                await self._append(
                    "tool.doubt", {"name": call.name, "reason": "nothing can tell whether it happened"}, ref=call.id
                )

    async def _verify(self, tool: Tool, call: Call) -> None:
        try:
            found = await tool.check(call)
        except Exception as exc:  # not knowing is an answer: the model sees the doubt
            await self._append("tool.doubt", {"name": call.name, "reason": f"verify failed: {exc}"}, ref=call.id)
            return
        if found is None or found is False:
            # It did not happen, and the host has let nobody else act since: this is the first time it really runs.
            await self._call(tool, call)
            return
        await self._append("tool.settled", {"output": render(found), "by": "verify"}, ref=call.id)


class _DeltaPump:
    """Coalesces the text of a streaming reply into at most 20 posts a second."""

    def __init__(self, wire: Wire, turn: int, part: int) -> None:
        self._wire, self._turn, self._part = wire, turn, part
        self._n = 0
        self._held: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, text: str) -> None:
        if not text:
            return
        self._held.append(text)
        if sum(map(len, self._held)) >= DELTA_CHARS:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELTA_S, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        text, self._held = "".join(self._held), []
        if text:
            self._wire.post({"t": "delta", "turn": self._turn, "part": self._part, "n": self._n, "text": text})
            self._n += 1

    def restart(self) -> None:
        """Begin afresh: the next piece is number 0 again and replaces what was sent."""
        self.close()
        self._held, self._n = [], 0

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
