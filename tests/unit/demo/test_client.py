"""The story's event reading against a socket that says exactly what the test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from recess.demo.client import StoryClient
from recess.demo.report import StoryFailed
from recess.errors import ServerUnavailable

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(position: int, kind: str = "note") -> bytes:
    return f"id: {position}\nevent: entry\ndata: {json.dumps({'position': position, 'kind': kind})}\n\n".encode()


@contextlib.asynccontextmanager
async def server(tmp_path, streams: list[list[bytes]], asked: list[str]):
    """Serve one scripted stream per connection; the last one stays open until the test ends."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        pieces = streams.pop(0)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if not streams:
            await done.wait()
        writer.close()

    path = tmp_path / "s"
    listener = await asyncio.start_unix_server(serve, path)
    yield StoryClient(path)
    done.set()
    listener.close()


async def test_entries_come_without_gap_or_double_over_several_streams(tmp_path) -> None:
    asked: list[str] = []
    first = HEAD + b": hello\n\n" + event(1) + event(2)
    streams = [[first[:90], first[90:]], [HEAD, event(2), event(3, "turn.end")]]
    async with server(tmp_path, streams, asked) as client:
        found, seen = await client.wait_entry("s", 0, lambda e: e["kind"] == "turn.end", "the end", 10)
    assert found["position"] == 3
    assert [e["position"] for e in seen] == [1, 2, 3]
    assert asked == ["/v1/sessions/s/events?after=0", "/v1/sessions/s/events?after=2"]


async def test_waiting_is_bounded_and_says_what_was_seen(tmp_path) -> None:
    async with server(tmp_path, [[HEAD, event(7)]], []) as client:
        with pytest.raises(StoryFailed, match="for the thaw") as caught:
            await client.wait_entry("s", 0, lambda e: False, "the thaw", 0.2)
    assert "7 note" in str(caught.value.details)


async def test_a_refused_stream_and_no_server(tmp_path) -> None:
    async with server(tmp_path, [[b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"]], []) as client:
        with pytest.raises(StoryFailed, match="404"):
            await client.wait_entry("s", 0, lambda e: True, "anything", 5)
    with pytest.raises(ServerUnavailable):
        await StoryClient(tmp_path / "none").wait_entry("s", 0, lambda e: True, "anything", 5)
