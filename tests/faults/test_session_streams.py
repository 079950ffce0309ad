"""Streams that are cut off: a hundred random drops, servers that restart, readers that sleep; over a real HTTP server."""

import asyncio
import json
import random

import pytest

from recess.api.app import make_app
from recess.api.wire import ProgressHub
from recess.testing.event_reader import EventReader
from recess.testing.event_reader import served as serve_app
from recess.testing.session_matrix import stored
from recess.testing.session_world import world

TOKENS = 300
AGENT = """
import asyncio, os, pathlib
from recess_agent import agent

SHARED = pathlib.Path(os.environ["SHARED"])

async def model(count):
    for n in range(count):
        if n == count // 2 and (SHARED / "half").exists() is False:
            (SHARED / "half").touch()
        yield {"text": f"t{n} "}
        await asyncio.sleep(0.012)

@agent(image="base", idle="30s")
async def me(s):
    async for turn in s:
        await s.stream(model(int(turn.text)))
"""


def whole(count):
    return "".join(f"t{n} " for n in range(count))


def served(w, folder):
    """Serve the world's sessions (those of its newest server) on a unix socket."""
    return serve_app(make_app(w, ProgressHub()), folder / "http.sock")


async def begin(w, shared, count):
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(shared)}})
    s = (await w.sessions.start("me")).id
    await w.sessions.send(s, str(count), key="1")
    return s


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_hundred_drops_and_two_restarts_miss_and_double_no_token(tmp_path, store):
    draw = random.Random(7)
    async with stored(store, tmp_path) as w, served(w, tmp_path) as path:
        s = await begin(w, tmp_path, TOKENS)
        reader, grown, restarts = EventReader(path, s), [], 0
        async with asyncio.timeout(60):
            while True:
                cut = draw.randrange(1, 1200) if reader.drops < 100 else None
                if await reader.connect(cut_after=cut):
                    break
                reader.drops += 1
                grown.append(len("".join(reader.pieces)))
                if reader.drops in (25, 60):  # the server dies in the middle of the reply
                    restarts += 1
                    await w.crash_server()
                    await w.sessions.recover()
        assert reader.faults == []
        assert reader.final == whole(TOKENS)
        assert reader.drops >= 100
        assert restarts == 2
        assert reader.positions == list(range(1, len(reader.positions) + 1))
        assert len(set(grown)) > 10, "it was shown while it was said"
        assert w.machines.machines, "the agent that said it was never begun anew"
        assert [e.kind for e in await w.entries(s)].count("turn.start") == 1


async def test_what_the_agent_says_while_no_server_listens_is_filled_in(tmp_path):
    async with world() as w, served(w, tmp_path) as path:
        s = await begin(w, tmp_path, 100)
        reader = EventReader(path, s)
        await reader.connect(cut_after=900)
        await w.sessions.abandon()
        await w.machines.drop_streams()
        async with asyncio.timeout(20):
            while not (tmp_path / "half").exists():  # said to nobody
                await asyncio.sleep(0.01)
        w.new_server()
        await w.sessions.recover()
        async with asyncio.timeout(20):
            while len(await w.log.deltas(s)) < 2 or "t50 " not in "".join(d.text for d in await w.log.deltas(s)):
                await asyncio.sleep(0.01)
        kept = await w.log.deltas(s)
        assert [d.n for d in kept] == list(range(len(kept))), "no piece is missing"
        assert whole(100).startswith("".join(d.text for d in kept))
        assert await reader.connect()
        assert reader.faults == []
        assert reader.final == whole(100)


async def test_a_reader_that_sleeps_holds_nobody_up(tmp_path):
    async with world() as w, served(w, tmp_path) as path:
        s = await begin(w, tmp_path, 50)
        sleeper, writer = await asyncio.open_unix_connection(path, limit=1024)
        writer.write(f"GET /v1/sessions/{s}/events HTTP/1.0\r\n\r\n".encode())
        await writer.drain()
        writer.transport.pause_reading()
        await w.until(s, "turn.end")
        for n in range(2, 12):  # far more than the sockets hold
            await w.sessions.send(s, "1", key=str(n), body={"filler": "x" * 300_000})
            await w.until(s, "turn.end", count=n)
        writer.transport.resume_reading()
        data = b""
        async with asyncio.timeout(20):
            while data.count(b"turn.end") < 11:
                data += await sleeper.read(1 << 16)
        writer.transport.abort()
        assert data.count(b"event: entry") >= 40


async def test_long_poll_goes_on_by_the_same_ids(tmp_path):
    async with world() as w, served(w, tmp_path) as path:
        s = await begin(w, tmp_path, 60)
        reader, place, calls = EventReader(path, s), "0", 0

        async def poll(after, wait):
            source, sink = await asyncio.open_unix_connection(path)
            sink.write(f"GET /v1/sessions/{s}/poll?after={after}&wait={wait} HTTP/1.0\r\n\r\n".encode())
            head, _, body = (await source.read()).partition(b"\r\n\r\n")
            sink.close()
            return int(head.split()[1]), json.loads(body)

        ended = False
        async with asyncio.timeout(30):
            while not ended:
                status, answer = await poll(place, 5)
                assert status == 200
                assert answer["events"], "it came back before anything was there"
                for one in answer["events"]:
                    ended = reader.take(one["id"], one["event"], one["data"]) or ended
                place, calls = answer["next"], calls + 1
        assert reader.faults == []
        assert reader.final == whole(60)
        assert calls > 5
        assert reader.positions == list(range(1, len(reader.positions) + 1))
        assert (await poll(place, 0))[1] == {"events": [], "next": place, "end": False}
        assert (await poll("nonsense", 0))[0] == 400
        assert (await poll(place, 1000))[0] == 400
        await w.sessions.close(s)
        assert (await poll(place, 5))[1]["end"] is True
