"""Running the tool calls of a reply: approval, the entry before, the call, the entry after. Also settling what a crash left.

The rule of the house: `tool.start` is durable before the tool runs, its outcome before the caller sees it. It knows the
log's entries through `append` and nothing of sockets.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from recess_agent.blobs import Attachment, Blob, Blobs
from recess_agent.cancelling import CANCELLED, CUT_SHORT, Stop, TurnCancelled
from recess_agent.signs import Watch, disk_full
from recess_agent.stream import ToolCall
from recess_agent.tools import Call, Tool, render
from recess_agent.waiting import IN_CALL, Waits
from recess_agent.wire import SessionError

Json = dict[str, Any]
OUTPUT_CHARS_MAX = 1024 * 1024
APPROVE, DENY = "approve", "deny"
REPEATABLE = ("pure", "keyed")


class Runs:
    """The tool calls of one turn."""

    def __init__(
        self,
        turn: int,
        tools: Mapping[str, Tool],
        append: Callable[..., Awaitable[Json]],
        waits: Waits,
        stop: Stop,
        blobs: Blobs,
    ) -> None:
        self._turn = turn
        self._tools = tools
        self._append = append
        self._waits = waits
        self._stop = stop
        self._blobs = blobs

    async def run(self, wanted: ToolCall) -> str:
        """Run one call and return its output. The tool's failure is an output, for the model to handle."""
        tool = self._tools.get(wanted.name)
        if tool is None:
            return await self._result(wanted.id, f"there is no tool named {wanted.name!r}", error=True)
        if not isinstance(wanted.arguments, dict):
            return await self._result(wanted.id, f"the arguments are not a JSON object: {wanted.arguments}", error=True)
        try:
            self._stop.check()
            refused = await self._refused(tool, wanted)
            if refused:
                return await self._result(wanted.id, refused, error=True)
            self._stop.check()
            started = await self._start(tool, wanted)
        except TurnCancelled:
            return await self._result(wanted.id, CANCELLED, error=True)
        call = Call(wanted.id, tool.name, wanted.arguments, str(started.get("key", "")), self._turn)
        return await self._call(tool, call)

    async def _start(self, tool: Tool, wanted: ToolCall) -> Json:
        body = {
            "name": tool.name, "arguments": wanted.arguments, "effect": tool.effect, "verify": tool.verify is not None,
        }  # fmt: skip
        try:
            return await self._append("tool.start", body, ref=wanted.id)
        except SessionError:
            self._stop.check()  # the host begins no new call in a turn that is being cancelled
            raise

    async def _refused(self, tool: Tool, wanted: ToolCall) -> str:
        """Ask a human if the tool's rule wants it; returns why the call must not run, or ""."""
        try:
            needed = tool.needs_approval(wanted.arguments)
        except Exception as exc:  # a rule that cannot decide does not approve
            return f"not run: its approval rule failed: {type(exc).__name__}: {exc}"
        if not needed:
            return ""
        text = f"Run {tool.name}({json.dumps(wanted.arguments, ensure_ascii=False)})?"
        about = {"call": wanted.id, "name": tool.name, "arguments": wanted.arguments}
        answer = await self._waits.ask(
            text, (APPROVE, DENY), tool.approve_timeout, False, f"approve-{wanted.id}", approval=about
        )
        if answer == APPROVE:
            return ""
        return "not run: a human denied it" if answer == DENY else "not run: nobody approved it in time"

    async def _call(self, tool: Tool, call: Call) -> str:
        within, watch = IN_CALL.set(call.id), Watch()
        kept: list[Blob] = []
        running = asyncio.ensure_future(tool.run(call))  # it takes a copy of the context along
        IN_CALL.reset(within)
        try:
            # A `once` call is let finish: how it ended is worth more than the moment. The host waits only so long.
            value = await (running if tool.effect == "once" else self._stop.race(running))
            output, error = await self._rendered(value, kept), False
        except TurnCancelled:
            output, error = CUT_SHORT, True
        except Exception as exc:  # the tool's failure is the model's to handle
            output, error = f"{type(exc).__name__}: {exc}{disk_full(exc)}", True
        return await self._result(call.id, output, error=error, told=watch.told(), kept=kept)

    async def _rendered(self, value: Any, kept: list[Blob]) -> str:
        """Return a tool's value as text; what it attached is kept, noted in `kept`, and shown as a line that names it."""
        parts = (
            list(value) if isinstance(value, (list, tuple)) and not isinstance(value, (Attachment, Blob)) else [value]
        )
        if not any(isinstance(one, (Attachment, Blob)) for one in parts):
            return render(value)
        lines: list[str] = []
        for one in parts:
            if isinstance(one, Attachment):
                one = await self._blobs.attach(one)
            if isinstance(one, Blob):
                kept.append(one)
            lines.append(str(one) if isinstance(one, Blob) else render(one))
        return "\n".join(lines)

    async def _shortened(self, output: str, kept: list[Blob]) -> str:
        """Return what of a long output goes into the log; the whole of it is kept as a blob, if the session may have one more."""
        dropped = len(output) - OUTPUT_CHARS_MAX
        try:
            kept.append(
                await self._blobs.put(output.encode("utf-8", "replace"), media_type="text/plain", name="output.txt")
            )
            where = f"all of it is {kept[-1]}"
        except SessionError as exc:
            if exc.code != "out_of_space":
                raise
            where = f"they were not kept: {exc}"
        return output[:OUTPUT_CHARS_MAX] + f"\n[recess] {dropped} more characters are not shown; {where}"

    async def _result(
        self, call_id: str, output: str, *, error: bool = False, told: str = "", kept: Sequence[Blob] = ()
    ) -> str:
        kept = list(kept)
        if len(output) > OUTPUT_CHARS_MAX:
            output = await self._shortened(output, kept)
        output += told
        body: Json = {"output": output}
        if kept:
            body["blobs"] = [one.ref() for one in kept]
        if error:
            body["error"] = True
        await self._append("tool.result", body, ref=call_id)
        return output

    # -- after a crash ---------------------------------------------------------------------------------------------

    async def settle(self, pending: list[Json]) -> None:
        """End the calls that a crash left open, before the turn goes on: ask `verify`, or run again where that is safe.

        Safe is what both say: the entry of the call that began, and the tool as this version of the code has it.
        """
        for one in pending:
            name, arguments = str(one.get("name")), dict(one.get("arguments") or {})
            tool = self._tools.get(name)
            call = Call(str(one["call_id"]), name, arguments, str(one.get("key", "")), self._turn)
            if tool is None:
                await self._doubt(call, "this version has no such tool")
            elif one.get("effect") in REPEATABLE and tool.effect in REPEATABLE:
                await self._call(tool, call)
            elif tool.verify is not None:
                await self._verify(tool, call)
            else:
                await self._doubt(call, "nothing can tell whether it happened")

    async def _verify(self, tool: Tool, call: Call) -> None:
        try:
            found = await tool.check(call)
        except Exception as exc:  # not knowing is an answer: the model sees the doubt
            await self._doubt(call, f"verify failed: {exc}")
            return
        if found is None or found is False:
            # It did not happen, and the host has let nobody else act since: this is the first time it really runs.
            await self._call(tool, call)
            return
        await self._append("tool.settled", {"output": render(found), "by": "verify"}, ref=call.id)

    async def _doubt(self, call: Call, reason: str) -> None:
        await self._append("tool.doubt", {"name": call.name, "reason": reason}, ref=call.id)
