"""What the story asks of a server: a thin async client of the HTTP API over the unix socket.

Calls go through the SDK's transport in a thread; the event stream is read here, so that waiting for an entry can be
cancelled and bounded. The shapes are those of docs/internals/http-api.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h11

from recess.demo.heartbeat import Heartbeat
from recess.demo.report import StoryFailed
from recess.errors import ServerUnavailable
from recess.sdk.transport import Json, OnProgress, Transport

CALL_S = 120.0


class StoryClient:
    """One server, by its socket."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._transport = Transport(socket_path=socket_path)

    async def call(
        self, method: str, path: str, body: object = None, *, key: str = "", query: Json | None = None
    ) -> Json:
        """Make one call. Raises the server's typed error, ServerUnavailable, TimeoutError."""
        return await asyncio.to_thread(self._transport.call, method, path, body, key=key, query=query, timeout_s=CALL_S)

    async def deploy(self, name: str, source: str, config: Json) -> str:
        """Store agent code; return its version."""
        body = {"name": name, "files": {"agent.py": source}, "config": config}
        return str((await self.call("POST", "/v1/agents", body))["version"])

    async def warm_up(self, on_progress: OnProgress) -> None:
        """Have the template of ordinary machines made, by starting one and removing it."""
        row = await asyncio.to_thread(
            self._transport.call_with_progress, "POST", "/v1/machines", {"name": "warm-up", "spec": {}}, on_progress
        )
        await self.call("DELETE", f"/v1/machines/{row['id']}", query={"force": 1})

    async def start_session(self, agent: str, name: str, on_progress: OnProgress) -> Json:
        """Start a session, telling the progress of what has to be made first."""
        body = {"agent": agent, "name": name}
        return await asyncio.to_thread(
            self._transport.call_with_progress, "POST", "/v1/sessions", body, on_progress, key=f"start-{name}"
        )

    async def send(self, session: str, text: str, key: str) -> int:
        """Send a message; return its position (the server answers before any machine exists)."""
        return int((await self.call("POST", f"/v1/sessions/{session}/messages", {"text": text}, key=key))["position"])

    async def session(self, ref: str) -> Json:
        """Return a session."""
        return await self.call("GET", f"/v1/sessions/{ref}")

    async def entries(self, session: str, after: int = 0) -> list[Json]:
        """Return all entries after a position."""
        found: list[Json] = []
        while True:
            page = await self.call("GET", f"/v1/sessions/{session}/log", query={"after": after, "limit": 1000})
            if not page["entries"]:
                return found
            found += page["entries"]
            after = int(found[-1]["position"])

    async def wait_entry(
        self, session: str, after: int, wanted: Callable[[Json], bool], what: str, timeout_s: float
    ) -> tuple[Json, list[Json]]:
        """Follow the log until an entry is wanted; return it and all entries seen. Raises StoryFailed in time."""
        seen: list[Json] = []
        try:
            async with asyncio.timeout(timeout_s):
                async for entry in self.follow(session, after):
                    seen.append(entry)
                    if wanted(entry):
                        return entry, seen
        except TimeoutError:
            pass
        kinds = [f"{e['position']} {e['kind']}" for e in seen[-20:]]
        raise StoryFailed(f"session {session}: waited {timeout_s:.0f} s for {what}", seen=kinds)

    async def follow(self, session: str, after: int) -> AsyncIterator[Json]:
        """Yield entries as they land, over as many streams as it takes, without gap or double."""
        while True:
            async for event, data in self._events(f"/v1/sessions/{quote(session)}/events?after={after}"):
                if event == "entry" and int(data["position"]) > after:
                    after = int(data["position"])
                    yield data
                elif event == "end":
                    return

    async def _events(self, target: str) -> AsyncIterator[tuple[str, Json]]:
        """Yield (event, data) of one server-sent event stream until it ends."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket_path))
        except OSError as exc:
            raise ServerUnavailable(f"no answer from the server: {exc}") from exc
        try:
            wire = h11.Connection(h11.CLIENT)
            headers = [("Host", "localhost"), ("Accept", "text/event-stream"), ("Connection", "close")]
            writer.write(wire.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
            writer.write(wire.send(h11.EndOfMessage()) or b"")
            buffer = ""
            async for data in _body(wire, reader):
                buffer += data.decode()
                *blocks, buffer = buffer.replace("\r\n", "\n").split("\n\n")
                for block in blocks:
                    event = _parse_event(block)
                    if event is not None:
                        yield event
        finally:
            writer.close()

    def heartbeat(self, machine: str) -> Heartbeat:
        """Return a heartbeat in a machine, to be used as an async context manager."""
        return Heartbeat(self._transport, machine)


async def _body(wire: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response) and event.status_code != 200:
            raise StoryFailed(f"the event stream was refused: {event.status_code}")
        elif isinstance(event, h11.Data):
            yield bytes(event.data)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return


def _parse_event(block: str) -> tuple[str, Json] | None:
    """Return an event of the stream (HTML standard, section 9.2), None for comments."""
    name, lines = "message", []
    for line in block.split("\n"):
        key, _, value = line.partition(":")
        if key == "event":
            name = value.removeprefix(" ")
        elif key == "data":
            lines.append(value.removeprefix(" "))
    if not lines:
        return None
    data: Any = json.loads("\n".join(lines))
    return name, data if isinstance(data, dict) else {"value": data}
