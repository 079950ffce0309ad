"""What the agent's streams do to a live session: accept one process, write what it appends, note what it waits for.

Only the process that the session expects is let in, and only once the supervisor has decided that its memory equals the
log. It must never know of machines or of when a session is put away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from recess.errors import Fenced, IllegalState, NotFound, RecessError
from recess.guestlink.link import ByteStream
from recess.sessions.channel import Channel, serve
from recess.sessions.deps import Deps
from recess.sessions.desk import Desk
from recess.sessions.lease import wait_event
from recess.sessions.protocol import Busy, DeltaLine, Drop, Hello, Request
from recess.sessions.uploads import Uploads, Whole
from recess.sessions.waits import known

HOLDS_MAX = 64
WAITS_MAX = 64
ACCEPT_S = 30.0

Begin = Callable[[Desk, Request], Awaitable[dict[str, Any]]]  # another session


class AgentSide:
    """`handler` goes to the machine; `ring` is called whenever the supervisor should look again."""

    def __init__(
        self, deps: Deps, session: str, ring: Callable[[], None], on_fenced: Callable[[Fenced], None], begin: Begin
    ) -> None:
        self._deps = deps
        self._session = session
        self._ring = ring
        self._on_fenced = on_fenced
        self._begin = begin
        self.active_s = deps.clock.monotonic_s()  # when the agent last said something
        self._open = asyncio.Event()
        self._over = False
        self.desk: Desk | None = None
        self.job_id = ""
        self.channel: Channel | None = None
        self.crash_detail = ""
        self.holds: dict[str, str] = {}
        self._telling = asyncio.Lock()
        self._uploads = Uploads(deps.log, session)
        self.watched = False  # whether each append of the agent's is a reason to look again (a snapshot policy)
        self.untold: list[tuple[str, dict[str, Any]]] = []  # events for the next greeted agent

    @property
    def waiting(self) -> bool:
        """Whether the agent asks for a turn."""
        return bool(self.channel and self.channel.waiting)

    @property
    def resting(self) -> bool:
        """Whether all the agent does, in the middle of its turn, is wait for something that the host will tell it."""
        channel = self.channel
        return bool(channel and channel.waits and not channel.waiting and not channel.busy)

    @property
    def at(self) -> str:
        """What the process is doing: next (waits for a turn) | wait (for an answer or a time, in its turn) | work."""
        return "next" if self.waiting else "wait" if self.resting else "work"

    def waits(self) -> dict[int, Request]:
        """Return the unanswered waits by request id: `refs` is what each waits for, `ref` the tool call that it is in."""
        return dict(self.channel.waits) if self.channel is not None else {}

    async def end_wait(self, number: int, result: Mapping[str, Any]) -> None:
        """Answer a wait. If the stream is cut the agent asks again on its next one, and gets the same answer."""
        channel = self.channel
        if channel is not None and channel.waits.pop(number, None) is not None:
            with contextlib.suppress(RecessError, OSError):
                await channel.catch_up()
                await channel.reply(number, result)

    async def catch_up(self) -> None:
        """Push what came into the log from elsewhere; a cut stream is no error."""
        if self.channel is not None and not self.channel.closed:
            with contextlib.suppress(RecessError, OSError):
                await self.channel.catch_up()

    async def tell_cancel(self, turn: int, why: str) -> None:
        """Ask the agent to stop its turn. It comes back with `next` when it has. Whoever asks has been heard when this returns."""
        async with self._telling:
            channel = self.channel
            if channel is not None and channel.cancelled != turn:
                channel.cancelled = turn
                with contextlib.suppress(RecessError, OSError):
                    await channel.catch_up()
                    await channel.send({"t": "cancel", "turn": turn, "why": why})

    def expect(self, job_id: str) -> None:
        """Let this process in from now on."""
        self.job_id = job_id
        self._open.set()

    async def shut(self, why: str = "") -> None:
        """Let nobody in until `expect`; with `why` the connected process is told to end, else it will come back."""
        self._open.clear()
        self.job_id = ""
        channel, self.channel = self.channel, None
        if channel is not None:
            await (channel.bye(why) if why else channel.close())

    async def close(self) -> None:
        """Serve no stream any more: one that comes is sent away at once, to find whoever serves the session next."""
        self._over = True
        await self.shut()
        self._open.set()  # who waits to be let in need not wait

    def hold(self, token: str, why: str) -> None:
        """Keep the machine awake until `release` of the same token. Raises IllegalState over the cap."""
        if len(self.holds) >= HOLDS_MAX and token not in self.holds:
            raise IllegalState(f"more than {HOLDS_MAX} holds")
        self.holds[token] = why
        self._ring()

    def release(self, token: str) -> None:
        """End a hold; an unknown token is no error."""
        self.holds.pop(token, None)
        self._ring()

    async def event(self, name: str, info: Mapping[str, Any], *, ack_s: float = 0.0) -> None:
        """Tell the connected agent; a cut stream is no error."""
        if self.channel is not None:
            with contextlib.suppress(RecessError, OSError):
                await self.channel.event(name, info, ack_s=ack_s)

    async def deliver(self, result: Mapping[str, Any]) -> None:
        """Answer the agent's `next`. If the stream is cut the agent asks again on its next one, and gets the same turn."""
        channel = self.channel
        if channel is None or not channel.waiting:
            return
        number, channel.waiting = channel.waiting, 0
        with contextlib.suppress(RecessError, OSError):
            await channel.catch_up()
            await channel.reply(number, result)

    async def handler(self, service: str, metadata: Mapping[str, Any], stream: ByteStream) -> None:
        """Serve one stream of the guest (an IncomingHandler)."""
        await serve(stream, self._accept, self._on_request, self._on_line)

    async def _accept(self, hello: Hello, stream: ByteStream) -> Channel | None:
        await wait_event(self._open, ACCEPT_S, self._deps.clock)
        if self._over or not self._open.is_set():
            return None
        channel = Channel(stream, hello, self._deps.log, self._session)
        if hello.job != self.job_id:
            await channel.bye("another process serves this session")
            return None
        old, self.channel = self.channel, channel
        if old is not None:
            await old.close()
        await channel.welcome(await self._deps.log.get(self._session))
        while self.untold:
            name, info = self.untold.pop(0)
            await channel.event(name, info)
        self._ring()
        return channel

    async def _on_request(self, channel: Channel, request: Request) -> None:
        if channel is not self.channel:
            return  # a newer stream of the same process has taken over, and asks again there
        self.active_s = self._deps.clock.monotonic_s()
        try:
            result = await self._answer(channel, request)
        except Fenced as exc:
            self._on_fenced(exc)
            return
        except RecessError as exc:
            await self._tell_why(request)
            await channel.refuse(request.id, exc)
            return
        if result is not None:
            await channel.reply(request.id, result)

    async def _tell_why(self, request: Request) -> None:
        """Before a call is refused because its turn is to stop, tell the agent that: a refusal alone would be an error of its
        loop, and end the process with its memory. Who decides on the turn may not have come to tell it yet."""
        desk = self.desk
        if desk is None or request.kind != "tool.start" or not desk.facts.open or request.turn != desk.facts.turn:
            return
        why = desk.halted()
        if why:
            await self.tell_cancel(request.turn, why)

    async def _answer(self, channel: Channel, request: Request) -> dict[str, Any] | None:
        desk = self.desk
        if desk is None:
            raise IllegalState(f"session {self._session} is not claimed here")
        match request.op:
            case "next":
                channel.waiting, channel.done, desk.shown = request.id, request.done, request.shown
                channel.waits.clear()  # they were the finished turn's
                self._ring()
                return None
            case "wait":
                self._check_wait(channel, desk, request)
                channel.waits[request.id] = request
                self._ring()
                return None
            case "spawn" | "fork":
                desk.check_turn(request.turn)
                return await self._begin(desk, request)
            case "put":
                came = await self._uploads.put(request, desk.limits)
                if not isinstance(came, Whole):
                    return dict(came)
                (position,) = await desk.append([came.draft])
                await channel.catch_up()  # its entry too: the agent need not make it up
                self._uploads.ended(request.token)
                return {**came.answer, "position": position}
            case "get":
                return await self._uploads.get(request)
            case "append":
                written = await desk.agent_append(request)
                await channel.catch_up(to=written.position - 1)
                channel.seen = max(channel.seen, written.position)
                if self.watched or desk.excess():
                    self._ring()
                result = {"position": written.position, "ts": written.ts, "key": written.key}
                return result if written.body is None else {**result, "body": dict(written.body)}
            case "hold":
                self.hold(request.token, request.why)
            case "release":
                self.release(request.token)
            case _:
                self.crash_detail = request.why
        return {}

    def _check_wait(self, channel: Channel, desk: Desk, request: Request) -> None:
        desk.check_turn(request.turn)
        if len(channel.waits) >= WAITS_MAX:
            raise IllegalState(f"more than {WAITS_MAX} waits at once")
        for ref in request.refs:
            if not known(desk.facts, ref):
                raise NotFound(f"wait: turn {request.turn} has asked, set or spawned nothing as {ref!r}")

    async def _on_line(self, channel: Channel, line: DeltaLine | Drop | Busy) -> None:
        if channel is not self.channel:
            return
        self.active_s = self._deps.clock.monotonic_s()
        match line:
            case Drop():
                channel.waits.pop(line.id, None)
            case Busy():
                channel.busy = line.on
                self._ring()
            case DeltaLine() if self.desk is not None:
                with contextlib.suppress(RecessError):
                    await self.desk.delta(line)
                if self.desk.excess():
                    self._ring()
