"""Giving up the page cache before a long sleep: when it is done, and that a guest that cannot still sleeps."""

import asyncio
from dataclasses import replace

import pytest

from recess.errors import GuestFailed, NotFound
from recess.machines import emptying
from recess.machines.emptying import drop_caches
from recess.machines.manager import Manager
from recess.testing.machine_room import SMALL

FLAG = "cat /proc/sys/vm/drop_caches"


@pytest.fixture
async def dev(room):
    room.parts = replace(room.parts, drop_caches=True)
    room.manager = Manager(room.parts)
    await room.manager.recover()
    row = await room.manager.create(SMALL, name="dev")
    await room.sh("dev", "mkdir -p /proc/sys/vm; echo 0 > /proc/sys/vm/drop_caches")
    return row


async def test_a_machine_that_is_put_away_gives_up_its_caches(room, dev):
    await room.manager.snapshot("dev")  # it runs on: it wants them
    assert await room.sh("dev", FLAG) == "0\n"
    await room.manager.suspend("dev")
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "3\n"
    left = await (await room.manager.link(dev.id)).jobs()
    assert not [job for job in left if job.argv[2].startswith("sync")]


async def test_a_paused_machine_is_put_away_as_it_is(room, dev):
    await room.manager.pause("dev")
    await room.manager.suspend("dev")
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "0\n"


async def test_without_the_knob_nothing_is_dropped(room):
    await room.manager.create(SMALL, name="dev")
    await room.sh("dev", "mkdir -p /proc/sys/vm; echo 0 > /proc/sys/vm/drop_caches")
    await room.manager.suspend("dev")
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "0\n"


class Link:
    """A guest whose job never ends, or that has no shell."""

    def __init__(self, error=None):
        self.job_id, self.error, self.done = "job", error, []

    async def exec(self, request):
        if self.error is not None:
            raise self.error
        return self

    async def wait(self):
        await asyncio.Event().wait()

    async def signal(self, number):
        self.done.append(number)

    async def forget(self, job_id):
        self.done.append(job_id)


@pytest.mark.parametrize("error", [NotFound("no sh"), GuestFailed("silent")])
async def test_a_guest_that_cannot_sleeps_with_its_caches(error):
    assert not await drop_caches(Link(error))


async def test_a_guest_that_is_too_slow_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(emptying, "WAIT_S", 0.01)
    link = Link()
    assert not await drop_caches(link)
    assert link.done == [9, "job"]
