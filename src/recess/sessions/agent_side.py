"""What the agent's streams do to a live session: accept one process, write what it appends, note what it waits for.

Only the process that the session expects is let in, and only once the supervisor has decided that its memory equals the
log. It must never know of machines or of when a session is put away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from recess.contextlog.contract import Entry
from recess.errors import Fenced, IllegalState, RecessError
from recess.guestlink.link import ByteStream
from recess.sessions.channel import Channel, serve
from recess.sessions.deps import Deps
from recess.sessions.desk import Desk
from recess.sessions.lease import wait_event
from recess.sessions.protocol import DeltaLine, Hello, Request

HOLDS_MAX = 64
ACCEPT_S = 30.0


class AgentSide:
    """`handler` goes to the machine; `ring` is called whenever the supervisor should look again."""

    def __init__(self, deps: Deps, session: str, ring: Callable[[], None], on_fenced: Callable[[Fenced], None]) -> None:
        self._deps = deps
        self._session = session
        self._ring = ring
        self._on_fenced = on_fenced
        self._open = asyncio.Event()
        self.desk: Desk | None = None
        self.job_id = ""
        self.channel: Channel | None = None
        self.crash_detail = ""
        self.holds: dict[str, str] = {}
        self.untold: list[tuple[str, dict[str, Any]]] = []  # events for the next greeted agent

    @property
    def waiting(self) -> bool:
        """Whether the agent asks for a turn."""
        return bool(self.channel and self.channel.waiting)

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
        await serve(stream, self._accept, self._on_request, self._on_delta)

    async def _accept(self, hello: Hello, stream: ByteStream) -> Channel | None:
        await wait_event(self._open, ACCEPT_S, self._deps.clock)
        if not self._open.is_set():
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
        try:
            result = await self._answer(channel, request)
        except Fenced as exc:
            self._on_fenced(exc)
            return
        except RecessError as exc:
            await channel.refuse(request.id, exc)
            return
        if result is not None:
            await channel.reply(request.id, result)

    async def _answer(self, channel: Channel, request: Request) -> dict[str, Any] | None:
        match request.op:
            case "next":
                channel.waiting, channel.done = request.id, request.done
                self._ring()
                return None
            case "append":
                if self.desk is None:
                    raise IllegalState(f"session {self._session} is not claimed here")
                written = await self.desk.agent_append(request)
                await channel.catch_up(to=written.position - 1)
                channel.seen = max(channel.seen, written.position)
                return {"position": written.position, "ts": written.ts, "key": written.key}
            case "hold":
                self.hold(request.token, request.why)
            case "release":
                self.release(request.token)
            case _:
                self.crash_detail = request.why
        return {}

    async def _on_delta(self, line: DeltaLine) -> None:
        if self.desk is not None:
            with contextlib.suppress(RecessError):
                await self.desk.delta(line)


def turn_message(entry: Entry | None) -> dict[str, Any]:
    """Return the body that a turn is about; a turn without a message has an empty one."""
    return dict(entry.body) if entry is not None else {}
