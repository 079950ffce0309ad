"""A client that shows a session from its event stream and is cut off again and again: what it has survives its connections.

For tests and benchmarks of reconnecting. It reads HTTP over a unix socket by hand, so that a connection can end after any byte; it
must never import the server that it reads from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn


class EventReader:
    """Everything that came of one session.

    `remember`: each connection asks to go on behind the last event (`Last-Event-ID`), and `faults` says what was wrong with what
    came. Without it, as a client that knows no ids: it shows whatever comes, and `shown` has what that makes.
    """

    def __init__(self, path: Path | str, session: str, *, remember: bool = True) -> None:
        self.path, self.session, self.remember = path, session, remember
        self.last, self.final, self.drops = "", "", 0
        self.pieces: list[str] = []
        self.shown: list[str] = []
        self.positions: list[int] = []
        self.faults: list[str] = []

    async def connect(self, *, cut_after: int | None = None) -> bool:
        """Read until the turn's end, or until `cut_after` bytes have come; tell whether the turn has ended."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            known = f"Last-Event-ID: {self.last}\r\n" if self.remember else ""
            writer.write(f"GET /v1/sessions/{self.session}/events HTTP/1.0\r\n{known}\r\n".encode())
            status = await reader.readline()
            if b"200" not in status:
                raise ConnectionError(f"the server answered {status!r}")
            while (await reader.readline()).strip():
                pass
            return await self._events(reader, cut_after)
        finally:
            writer.transport.abort()

    async def _events(self, reader: asyncio.StreamReader, left: int | None) -> bool:
        event: dict[str, str] = {}
        while line := await reader.readline():
            if left is not None:
                left -= len(line)
                if left <= 0:
                    return False
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                event[name] = value
            elif event:
                if self.take(event["id"], event["event"], json.loads(event["data"])):
                    return True
                event = {}
        return False

    def take(self, ident: str, kind: str, data: dict[str, Any]) -> bool:
        """Take one event; tell whether it is the turn's end."""
        self.last = ident
        if kind == "delta":
            self.shown.append(data["text"])
            if data["n"] == 0:
                self.pieces = []
            if len(self.pieces) != data["n"]:
                self.faults.append(f"piece {data['n']} came behind {len(self.pieces)} others")
            self.pieces.append(data["text"])
            return False
        self.positions.append(data["position"])
        if data["kind"] == "assistant":
            self.final = data["body"]["text"]
            if not self.final.startswith("".join(self.pieces)):
                self.faults.append("what was shown is not what was said")
        return bool(data["kind"] == "turn.end")


@contextlib.asynccontextmanager
async def served(app: Any, path: Path) -> AsyncIterator[Path]:
    """Serve an application on a unix socket, by the HTTP server that users have."""
    config = uvicorn.Config(app, uds=str(path), log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - the server has no event for it
        await asyncio.sleep(0.01)
    try:
        yield path
    finally:
        server.should_exit = server.force_exit = True
        await task
