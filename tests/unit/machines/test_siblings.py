"""Machines that reach each other by name: inside a project only, waking who sleeps, bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from recess.errors import RecessError, Unavailable
from recess.machines import forward
from recess.testing.clock import FakeClock
from recess.testing.machine_room import SMALL, machine_room


async def serving(room, name, *, project="", **more):
    spec = replace(SMALL, argv=("httpd", "8080"), labels={"project": project} if project else {}, **more)
    row = await room.manager.create(spec, name=name)
    link = await room.manager.link(row.id)
    async with asyncio.timeout(30):
        while True:
            try:
                await (await link.dial(8080)).close()
                return row
            except RecessError:
                await asyncio.sleep(0)


async def calling(room, name="caller", *, project=""):
    return await room.manager.create(replace(SMALL, labels={"project": project} if project else {}), name=name)


async def asked(pipe):
    reader, writer = pipe
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    head = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return head


async def test_a_machine_reaches_another_of_its_project(room):
    await serving(room, "db", project="shop")
    caller = await calling(room, project="shop")
    assert b"HTTP/1.0 404" in await asked(await room.manager.siblings.connect(caller.id, "db", 8080))


async def test_nothing_crosses_a_projects_border_and_nothing_tells_that_it_is_there(room):
    await serving(room, "db", project="shop")
    stranger = await calling(room, project="bank")
    said = []
    for name in ("db", "nobody"):
        with pytest.raises(Unavailable) as caught:
            await room.manager.siblings.connect(stranger.id, name, 8080)
        said.append(caught.value.message.replace(name, "X"))
    assert said[0] == said[1]
    plain = await calling(room, "plain")
    with pytest.raises(Unavailable, match="no machine goes by the name db in no project"):
        await room.manager.siblings.connect(plain.id, "db", 8080)


async def test_a_name_no_host_can_have_goes_by_the_nearest_one(room):
    await serving(room, "My_Db.1")
    caller = await calling(room)
    assert b"404" in await asked(await room.manager.siblings.connect(caller.id, "my-db-1", 8080))
    await serving(room, "my-db_1")
    with pytest.raises(Unavailable, match="several machines go by the name my-db-1"):
        await room.manager.siblings.connect(caller.id, "my-db-1", 8080)


async def test_none_means_not_reachable_either(room):
    await serving(room, "db", network="none")
    caller = await calling(room)
    with pytest.raises(Unavailable, match="no machine goes by the name db"):
        await room.manager.siblings.connect(caller.id, "db", 8080)


async def test_nobody_listens_and_the_caller_is_told(room):
    await serving(room, "db")
    caller = await calling(room)
    with pytest.raises(Unavailable, match="machine db does not answer on port 1234"):
        await room.manager.siblings.connect(caller.id, "db", 1234)
    await room.manager.suspend("db")
    with pytest.raises(Unavailable, match="machine db does not answer on port 8080"):
        await room.manager.siblings.connect(caller.id, "db", 8080)


async def test_a_call_wakes_a_machine_that_nobody_used_and_counts_as_use(tmp_path):
    clock = FakeClock()
    async with machine_room(tmp_path, clock=clock) as room:
        row = await serving(room, "db", idle_s=30.0)
        caller = await calling(room)
        seen = room.manager.events.newest
        await clock.advance(31.0)
        while not [one for one in await room.manager.events.wait(seen) if one.action == "idle"]:
            seen = room.manager.events.newest
        assert room.manager.fleet.find(row.id) is None
        pipe = await room.manager.siblings.connect(caller.id, "db", 8080)
        live = room.manager.fleet.find(row.id)
        assert live is not None
        assert live.forwarder.connections == 1
        assert b"404" in await asked(pipe)


async def test_connections_to_one_machine_are_bounded(room, monkeypatch):
    monkeypatch.setattr(forward, "CONNECTIONS_MAX", 2)
    await serving(room, "db")
    caller = await calling(room)
    held = [await room.manager.siblings.connect(caller.id, "db", 8080) for _ in range(2)]
    with pytest.raises(Unavailable, match="2 connections to this machine are open"):
        await room.manager.siblings.connect(caller.id, "db", 8080)
    for pipe in held:
        assert b"404" in await asked(pipe)


async def test_what_is_open_ends_with_the_machine(room):
    await serving(room, "db")
    caller = await calling(room)
    reader, writer = await room.manager.siblings.connect(caller.id, "db", 8080)
    await room.manager.remove("db", force=True)
    async with asyncio.timeout(30):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
