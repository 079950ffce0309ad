"""Blobs through the in-guest SDK: put, got, attached, inherited, limited; never another session's."""

import asyncio
import hashlib

import pytest

from recess import crashpoints
from recess.errors import BadInput
from recess.sessions.limits import Limits, parse_limits
from recess.testing.contextlog_blobs import read
from recess.testing.session_agents import MARKS
from recess.testing.session_world import notes, texts, world

AGENT = (
    MARKS
    + """
import asyncio, hashlib
from recess_agent import Attachment, Blob, agent, tool

BIG = bytes(range(256)) * 10_000  # three pieces

@tool
def plot() -> list:
    (SHARED / "plot.png").write_bytes(b"png" * 100)
    return ["two plots:", Attachment(SHARED / "plot.png", "image/png"), Attachment(b"second", name="b.bin")]

@tool
def chatter() -> str:
    return "0123456789" * 200_000

@tool
def lost() -> Attachment:
    return Attachment(SHARED / "nothing")

@agent(image="base", idle="60s", tools=[plot, chatter, lost], limits={"blob": "3M", "blobs": "4M"})
async def me(s):
    async for turn in s:
        name, _, rest = turn.text.partition(" ")
        if name == "put":
            blob = await s.blobs.put(BIG, media_type="application/x", name=rest)
            await s.note(**blob.ref())
            await s.say(str(blob))
        elif name == "get":
            try:
                data = await s.blobs.get(rest)
                await s.say(str(len(data)) + " " + hashlib.sha256(data).hexdigest())
            except Exception as exc:
                await s.say(getattr(exc, "code", "?") + ": " + str(exc))
        elif name == "save":
            await s.blobs.save(Blob.of({"blob": rest, "size": 1}), SHARED / "saved")
            await s.say("saved")
        elif name == "huge":
            try:
                await s.blobs.put(b"x" * int(rest))
            except Exception as exc:
                await s.say(getattr(exc, "code", "?") + ": " + str(exc))
        elif name == "raw":
            try:
                await s._wire.request("append", kind="blob", body={"hash": rest, "size": 0, "media_type": "", "name": ""}, turn=0)
            except Exception as exc:
                await s.say(getattr(exc, "code", "?"))
        else:
            reply = await s.stream(answer([{"id": name, "name": name, "arguments": {}}]))
            await s.run_tools(reply)

async def answer(calls):
    return {"choices": [{"message": {"content": "", "tool_calls": [
        {"id": c["id"], "function": {"name": c["name"], "arguments": "{}"}} for c in calls]}}]}
"""
)
BIG = bytes(range(256)) * 10_000
DIGEST = hashlib.sha256(BIG).hexdigest()


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    crashpoints.disarm_all()


async def started(w, shared):
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(shared)}})
    return (await w.sessions.start("me")).id


def results(log):
    return [e.body for e in log if e.kind == "tool.result"]


async def test_put_and_got_also_by_a_fork_and_by_nobody_else(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "put big", turn=1)
        assert texts(log) == [f"[blob {DIGEST}: big, application/x, {len(BIG)} bytes]"]
        assert notes(log) == [{"blob": DIGEST, "size": len(BIG), "media_type": "application/x", "name": "big"}]
        (entry,) = await w.entries(s, "blob")
        assert (entry.turn, entry.body["hash"]) == (0, DIGEST)
        log = await w.say(s, f"get {DIGEST}", turn=2)
        assert texts(log)[-1] == f"{len(BIG)} {DIGEST}"
        await w.say(s, f"save {DIGEST}", turn=3)
        assert (tmp_path / "saved").read_bytes() == BIG
        await w.say(s, "put big", turn=4)
        assert len(await w.entries(s, "blob")) == 1

        child = await w.sessions.fork(s)
        await w.sessions.send(child.id, f"get {DIGEST}", key="c")
        await w.until(child.id, "turn.end", count=5)
        assert texts(await w.entries(child.id))[-1] == f"{len(BIG)} {DIGEST}"

        other = (await w.sessions.start("me")).id
        log = await w.say(other, f"get {DIGEST}", turn=1)
        assert texts(log)[-1].startswith("not_found: ")
        log = await w.say(other, f"raw {DIGEST}", turn=2)
        assert texts(log)[-1] == "bad_input"
        assert await w.log.find_blobs(other) == []


async def test_what_a_tool_attaches_is_kept_and_named_in_its_result(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "plot", turn=1)
        (result,) = results(log)
        first, second = result["blobs"]
        assert (first["name"], first["media_type"], first["size"]) == ("plot.png", "image/png", 300)
        assert (second["name"], second["size"]) == ("b.bin", 6)
        assert result["output"].splitlines() == [
            "two plots:",
            f"[blob {first['blob']}: plot.png, image/png, 300 bytes]",
            f"[blob {second['blob']}: b.bin, 6 bytes]",
        ]
        (found,) = await w.log.find_blobs(s, first["blob"])
        assert await read(w.log, found) == b"png" * 100
        log = await w.say(s, "lost", turn=2)
        assert results(log)[-1]["error"] is True
        assert "FileNotFoundError" in results(log)[-1]["output"]


async def test_a_long_output_is_shortened_and_kept_whole(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, tmp_path)
        (result,) = results(await w.say(s, "chatter", turn=1))
        assert len(result["output"]) < 1 << 21
        assert "characters are not shown; all of it is [blob " in result["output"][-200:]
        (found,) = await w.log.find_blobs(s, result["blobs"][0]["blob"])
        assert await read(w.log, found) == b"0123456789" * 200_000
        (_first, again) = results(await w.say(s, "chatter", turn=2))
        assert again["blobs"] == result["blobs"]
        assert len(await w.log.find_blobs(s)) == 1
        await w.say(s, "huge 2100000", turn=3)
        full = results(await w.say(s, "chatter", turn=4))[-1]
        assert "they were not kept: the session holds 4.1 MB of blobs" in full["output"][-200:]
        assert "blobs" not in full


async def test_limits_refuse_and_the_turn_goes_on(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, tmp_path)
        log = await w.say(s, "huge 3145729", turn=1)
        assert texts(log)[-1] == "out_of_space: a blob of more than 3.1 MB (limits: blob)"
        await w.say(s, "put one", turn=2)
        log = await w.say(s, "huge 2000000", turn=3)
        assert texts(log)[-1].startswith("out_of_space: the session holds 2.6 MB of blobs, and more than 4.2 MB")
        assert [e.body["status"] for e in await w.entries(s, "turn.end")] == ["done"] * 3
        assert len(await w.log.find_blobs(s)) == 1


async def test_a_server_that_dies_behind_a_piece_stores_the_blob_once(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, tmp_path)
        await w.say(s, "get nothing", turn=1)  # it is up
        crashpoints.arm("blob.after_piece", skip=1)
        await w.sessions.send(s, "put big", key="m2")
        async with asyncio.timeout(20):
            while crashpoints.is_armed("blob.after_piece"):
                await asyncio.sleep(0.005)
        await w.crash_server()
        await w.sessions.recover()
        await w.until(s, "turn.end", count=2)
        (found,) = await w.log.find_blobs(s)
        assert await read(w.log, found) == BIG
        assert len(await w.entries(s, "turn.cut")) == 0  # the very same call went on


def test_limits_of_blobs_are_read():
    assert parse_limits({"blob": "3M", "blobs": "1G"}) == Limits(blob_bytes=3 << 20, blobs_bytes=1 << 30)
    with pytest.raises(BadInput):
        parse_limits({"blobs": -1})
