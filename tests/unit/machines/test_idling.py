"""The idle policy of plain machines: when one is put away, that use keeps it and wakes it, and that looking does neither."""

import asyncio
from dataclasses import replace

import pytest

from recess.errors import Corrupt, IllegalState, InvalidSpec
from recess.machines.idling import Use, due
from recess.testing.clock import FakeClock
from recess.testing.machine_room import SMALL, machine_room

IDLE = replace(SMALL, idle_s=30.0)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def room(tmp_path, clock):
    async with machine_room(tmp_path, clock=clock) as opened:
        yield opened


async def event(room, action, seen=0):
    """Wait until it has happened; the clock stands still meanwhile."""
    while True:
        for one in await room.manager.events.wait(seen):
            seen = one.number
            if one.action == action:
                return one


async def asleep(room, clock, name="dev", seconds=31.0):
    seen = room.manager.events.newest
    await clock.advance(seconds)
    await event(room, "idle", seen)
    assert (await room.manager.get(name)).state == "suspended"


@pytest.mark.parametrize(
    ("use", "quiet", "idle", "expected"),
    [
        (Use(), 0.0, 30.0, 7.5),
        (Use(), 29.0, 30.0, 1.0),
        (Use(), 30.0, 30.0, 0.0),
        (Use(), 99.0, 30.0, 0.0),
        (Use(users=1), 99.0, 30.0, 7.5),
        (Use(connections=1), 99.0, 30.0, 7.5),
        (Use(calls=1), 99.0, 30.0, 7.5),
        (Use(cpu_share=0.9), 99.0, 30.0, 7.5),
        (Use(cpu_share=0.1), 99.0, 30.0, 0.0),
        (Use(), 0.0, 3600.0, 15.0),
        (Use(), 0.0, 0.5, 0.25),
    ],
)
def test_when_to_look_again_and_when_to_put_it_away(use, quiet, idle, expected):
    assert due(use, quiet, idle) == expected


async def test_it_is_suspended_with_its_memory_and_wakes_when_it_is_used(room, clock):
    await room.manager.create(IDLE, name="dev")
    await room.sh("dev", "echo held > /tmp/memory")
    await asleep(room, clock)
    assert room.host.vms == {}
    row = await room.manager.get("dev")
    async with room.manager.idling.using(row.id) as link:
        assert await link.read_file("/tmp/memory") == b"held\n"
    row = await room.manager.get("dev")
    assert (row.state, "napping" in row.meta) == ("running", False)
    await asleep(room, clock)  # and again


async def test_looking_wakes_nobody(room, clock):
    row = await room.manager.create(IDLE, name="dev")
    await asleep(room, clock)
    assert [one.name for one in await room.manager.list_machines()] == ["dev"]
    await room.manager.output("dev")
    for look in (room.manager.processes("dev"), room.manager.stats("dev"), room.manager.link(row.id)):
        with pytest.raises(IllegalState):
            await look
    with pytest.raises(IllegalState, match="suspended"):
        async with room.manager.idling.using(row.id, wake=False):
            pass
    assert (await room.manager.get("dev")).state == "suspended"


async def test_use_keeps_it_awake(room, clock):
    row = await room.manager.create(IDLE, name="dev")
    async with room.manager.idling.using(row.id):
        await clock.advance(300)
        assert (await room.manager.get("dev")).state == "running"
    await clock.advance(29)
    assert (await room.manager.get("dev")).state == "running"
    await asleep(room, clock, seconds=2.0)


async def test_work_and_pauses_keep_it_too(room, clock, monkeypatch):
    row = await room.manager.create(IDLE, name="dev")
    vm = room.manager.fleet.need(row.id).vm
    stats = await vm.stats()

    async def busy():
        return replace(stats, cpu_s=clock.monotonic_s() * 0.5)

    monkeypatch.setattr(vm, "stats", busy)
    await clock.advance(300)
    assert (await room.manager.get("dev")).state == "running"
    monkeypatch.undo()
    await room.manager.pause("dev")
    await clock.advance(300)
    assert (await room.manager.get("dev")).state == "paused"


async def test_whoever_connects_wakes_it(room, clock):
    spec = replace(IDLE, argv=("httpd", "80"), ports=(("127.0.0.1", 0, 80),))
    row = await room.manager.create(spec, name="web")
    ((ip, port, _),) = row.meta["ports"]
    assert await asked(ip, port)
    await asleep(room, clock, "web")
    assert await asyncio.gather(*(asked(ip, port) for _ in range(3))) == [True] * 3
    row = await room.manager.get("web")
    assert (row.state, row.meta["ports"]) == ("running", [[ip, port, 80]])


async def asked(ip, port):
    """Ask until there is an answer: a fake guest's program listens again a moment after its thaw."""
    answer = b""
    while not answer:
        reader, writer = await asyncio.open_connection(ip, port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        answer = await reader.read()
        writer.close()
    return answer.startswith(b"HTTP/1.0 404")


async def test_an_open_connection_keeps_it_awake(room, clock):
    spec = replace(IDLE, argv=("httpd", "80"), ports=(("127.0.0.1", 0, 80),))
    row = await room.manager.create(spec, name="web")
    _, port, _ = row.meta["ports"][0]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await room.sh("web", "true")
    await clock.advance(300)
    assert (await room.manager.get("web")).state == "running"
    writer.close()


async def test_the_next_server_keeps_its_ports_and_wakes_it(room, clock):
    spec = replace(IDLE, argv=("httpd", "80"), ports=(("127.0.0.1", 0, 80),))
    await room.manager.create(spec, name="web")
    await asleep(room, clock, "web")
    await room.restart()
    ((ip, port, _),) = (await room.manager.get("web")).meta["ports"]
    assert await asked(ip, port)
    await asleep(room, clock, "web")


async def test_a_machine_that_is_taken_over_has_its_policy(room, clock):
    await room.manager.create(IDLE, name="dev")
    await room.restart(killed=True)
    await asleep(room, clock)


async def test_one_that_was_suspended_by_hand_is_woken_by_hand(room, clock):
    row = await room.manager.create(IDLE, name="dev")
    await asleep(room, clock)
    await room.manager.resume("dev")
    await room.manager.suspend("dev")
    with pytest.raises(IllegalState):
        async with room.manager.idling.using(row.id):
            pass
    await room.manager.resume("dev")
    await asleep(room, clock)


async def test_who_comes_while_it_is_put_away_waits_and_wakes_it(room, clock, monkeypatch):
    row = await room.manager.create(IDLE, name="dev")
    idling, began, go_on = room.manager.idling, asyncio.Event(), asyncio.Event()
    real = idling._put_away

    async def slow(record):
        began.set()
        await go_on.wait()
        return await real(record)

    monkeypatch.setattr(idling, "_put_away", slow)
    await clock.advance(31)
    await began.wait()

    async def use():
        async with idling.using(row.id) as link:
            return await link.ping()

    user = asyncio.create_task(use())
    await asyncio.sleep(0)
    go_on.set()
    assert await user >= 0.0
    assert (await room.manager.get("dev")).state == "running"


async def test_one_that_cannot_be_put_away_runs_on_and_is_tried_again(room, clock):
    await room.manager.create(IDLE, name="dev")
    room.fill_disk(True)
    await clock.advance(31)
    while (await room.manager.get("dev")).meta.get("napping") or clock.sleepers == 0:
        await asyncio.sleep(0)
    assert (await room.manager.get("dev")).state == "running"
    await room.sh("dev", "true")
    room.fill_disk(False)
    await asleep(room, clock)


async def test_a_wake_that_fails_leaves_it_asleep_with_its_ports(room, clock, monkeypatch):
    spec = replace(IDLE, argv=("httpd", "80"), ports=(("127.0.0.1", 0, 80),))
    row = await room.manager.create(spec, name="web")
    await asleep(room, clock, "web")

    async def damaged(_record):
        raise Corrupt("a frame is not what was written")

    monkeypatch.setattr(room.manager.idling, "_wake", damaged)
    with pytest.raises(Corrupt):
        async with room.manager.idling.using(row.id):
            pass
    monkeypatch.undo()
    ((ip, port, _),) = (await room.manager.get("web")).meta["ports"]
    assert await asked(ip, port)


@pytest.mark.parametrize("act", ["stop", "kill", "remove"])
async def test_its_end_closes_its_ports(room, clock, act):
    spec = replace(IDLE, argv=("httpd", "80"), ports=(("127.0.0.1", 0, 80),))
    row = await room.manager.create(spec, name="web")
    _, port, _ = row.meta["ports"][0]
    await asleep(room, clock, "web")
    await getattr(room.manager, act)("web", **({"why": "enough"} if act == "kill" else {}))
    with pytest.raises(ConnectionRefusedError):
        await asked("127.0.0.1", port)


async def test_what_is_refused(room):
    for idle in (-1.0, 1e9):
        with pytest.raises(InvalidSpec, match="idle"):
            await room.manager.create(replace(SMALL, idle_s=idle))
