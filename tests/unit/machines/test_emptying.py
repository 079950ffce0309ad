"""Giving up the page cache before a long sleep: when it is done, and that a guest that cannot still sleeps."""

import asyncio
from dataclasses import replace

import pytest

from recess.clock import SystemClock
from recess.errors import BadInput, GuestFailed, IllegalState, NotFound
from recess.machines import emptying
from recess.machines.emptying import drop_caches, parse_policy, should_drop
from recess.machines.manager import Manager
from recess.testing.machine_room import SMALL

FLAG = "cat /proc/sys/vm/drop_caches"


@pytest.fixture
async def dev(room):
    room.parts = replace(room.parts, drop_caches=0.0)
    room.manager = Manager(room.parts)
    await room.manager.recover()
    row = await room.manager.create(SMALL, name="dev")
    await room.sh("dev", "mkdir -p /proc/sys/vm; echo 0 > /proc/sys/vm/drop_caches")
    return row


class Ahead(SystemClock):
    """The real clock, some seconds ahead."""

    ahead_s = 0.0

    def monotonic_s(self):
        return super().monotonic_s() + self.ahead_s


async def with_clock(room):
    """Drop the caches of machines that were idle for ten minutes from now on, by this clock."""
    await room.manager.close(detach=True)
    room.parts = replace(room.parts, drop_caches=600.0, clock=Ahead())
    room.manager = Manager(room.parts)
    await room.manager.recover()
    return room.parts.clock


async def test_a_machine_that_is_put_away_gives_up_its_caches(room, dev):
    await room.manager.snapshot("dev")  # it runs on: it wants them
    assert await room.sh("dev", FLAG) == "0\n"
    await room.manager.suspend("dev")
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "3\n"
    left = await (await room.manager.link(dev.id)).jobs()
    assert not [job for job in left if job.argv[2].startswith("sync")]


async def test_only_a_machine_that_was_idle_for_long_gives_them_up(room, dev):
    clock = await with_clock(room)
    clock.ahead_s += 500
    await room.manager.suspend("dev")
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "0\n"  # it was asked just now: idle since then
    clock.ahead_s += 601
    await room.manager.suspend("dev")
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "3\n"


async def test_who_knows_better_says_how_long_it_was_idle(room, dev):
    """A session's agent is at work without anybody asking for the link."""
    (await with_clock(room)).ahead_s += 601
    row = await room.manager.snapshot("dev", resume=False, idle_s=1.0)
    await room.manager.evict("dev", snapshot=row.id)
    await room.manager.resume("dev")
    assert await room.sh("dev", FLAG) == "0\n"


@pytest.mark.parametrize(
    ("text", "policy"),
    [("off", None), ("False", None), ("", None), ("always", 0.0), ("True", 0.0), ("10m", 600.0), ("30", 30.0)],
)
def test_the_knob(text, policy):
    assert parse_policy(text) == policy


@pytest.mark.parametrize("text", ["soon", "-1", "10m!", "x" * 100])
def test_a_knob_that_cannot_be(text):
    with pytest.raises(BadInput, match="drop_caches"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("policy", "idle_s", "goes_on", "runs", "dropped"),
    [
        (None, 1e9, False, True, False),
        (0.0, 0.0, False, True, True),
        (60.0, 59.9, False, True, False),
        (60.0, 60.0, False, True, True),
        (60.0, 60.0, True, True, False),
        (60.0, 60.0, False, False, False),
    ],
)
def test_the_decision(policy, idle_s, goes_on, runs, dropped):
    assert should_drop(policy, idle_s=idle_s, goes_on=goes_on, runs=runs) is dropped


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
        raise IllegalState("it was killed, and has not ended")


@pytest.mark.parametrize("error", [NotFound("no sh"), GuestFailed("silent")])
async def test_a_guest_that_cannot_sleeps_with_its_caches(error):
    assert not await drop_caches(Link(error))


async def test_a_guest_that_is_too_slow_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(emptying, "WAIT_S", 0.01)
    link = Link()
    assert not await drop_caches(link)
    assert link.done == [9, "job"]
