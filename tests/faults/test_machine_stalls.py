"""The host's disk is full under a running guest: it stands still, says so, and goes on by itself."""

from __future__ import annotations

import asyncio

import pytest

from recess.errors import OutOfSpace
from recess.machines import stalls
from recess.machines.stalls import room_wanted
from recess.testing.machine_room import SMALL, machine_room
from recess.units import GIB, MIB


@pytest.fixture
async def room(tmp_path, monkeypatch):
    monkeypatch.setattr(stalls, "LOOK_EVERY_S", 0.005)
    monkeypatch.setattr(stalls, "SETTLED_S", 0.02)
    async with machine_room(tmp_path) as opened:
        yield opened


def full(room, is_full):
    room.manager.fleet.stalls.usage = lambda: (100 * GIB, 0 if is_full else 50 * GIB)
    for vm in room.host.vms.values():
        vm.room = not is_full


async def until(room, ref, state):
    while (await room.manager.get(ref)).state != state:
        await asyncio.sleep(0.002)


def stall(room, row):
    full(room, True)
    room.host.vms[row.id].stall("the host's disk is full")


@pytest.mark.parametrize(
    ("reserve", "disk", "wanted"),
    [(256 * MIB, 100 * GIB, 256 * MIB), (256 * MIB, GIB, GIB // 20), (0, GIB, 0)],
)
def test_how_much_room_is_wanted(reserve, disk, wanted):
    assert room_wanted(reserve, disk) == wanted


async def test_it_is_shown_and_goes_on_by_itself(room):
    row = await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo here > /dev/shm/x")
    stall(room, row)
    await until(room, "m1", "stalled")
    (shown,) = await room.manager.list_machines()
    assert (shown.state, shown.status) == ("stalled", "the host's disk is full")
    assert "make room" in shown.meta["hint"]
    assert any("stands still" in line for line in room.lines)
    with pytest.raises(OutOfSpace, match="stands still"):
        await room.manager.link(row.id)
    assert (await room.manager.stats("m1"))["private_bytes"] > 0
    full(room, False)
    await until(room, "m1", "running")
    assert await room.sh("m1", "cat /dev/shm/x") == "here\n"
    assert any("goes on after" in line for line in room.lines)
    assert (await room.manager.get("m1")).status == ""


async def test_a_try_that_comes_too_early_leaves_it_stalled(room):
    row = await room.manager.create(SMALL, name="m1")
    stall(room, row)
    await until(room, "m1", "stalled")
    room.manager.fleet.stalls.usage = lambda: (100 * GIB, 50 * GIB)  # room by the figures, none for the write
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert (await room.manager.get("m1")).state == "stalled"
    room.host.vms[row.id].room = True
    await until(room, "m1", "running")


@pytest.mark.parametrize("end", ["kill", "stop", "remove", "dies"])
async def test_it_can_be_ended_while_it_stands_still(room, end):
    row = await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo kept > /root/f")
    stall(room, row)
    await until(room, "m1", "stalled")
    if end == "dies":
        await room.host.vms[row.id].die("killed")
        await room.manager.wait_dead(row.id)
    elif end == "kill":
        await room.manager.kill("m1", why="test")
    else:
        await (room.manager.stop("m1") if end == "stop" else room.manager.remove("m1", force=True))
    assert room.host.vms == {}
    if end != "remove":
        full(room, False)
        assert (await room.manager.bring_back(row.id)).rung == 4
        assert await room.sh(row.id, "cat /root/f") == "kept\n"


async def test_the_next_server_takes_it_over_and_lets_it_go_on(room):
    row = await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo here > /dev/shm/x")
    stall(room, row)
    await until(room, "m1", "stalled")
    counts = await room.restart(killed=True)
    full(room, True)
    assert counts["adopted"] == 1
    assert (await room.manager.get("m1")).state == "stalled"
    full(room, False)
    await until(room, "m1", "running")
    assert await room.sh("m1", "cat /dev/shm/x") == "here\n"
