"""The newest events: numbers that only grow, waiting for more, names remembered."""

import asyncio

from recess.machines.events import EVENTS_MAX, Events


def test_numbers_grow_across_servers_and_the_ring_is_bounded():
    first, second = Events(), Events()
    for _ in range(EVENTS_MAX + 5):
        first.publish(100.0, "start", "m", "dev", {})
    second.publish(101.0, "start", "m", "dev", {})
    assert second.newest > first.newest
    assert len(first.after(0)) == EVENTS_MAX
    assert [event.number for event in first.after(first.newest - 2)] == [first.newest - 1, first.newest]


def test_a_name_is_remembered_from_before():
    events = Events()
    events.publish(1.0, "create", "m", "dev", {})
    events.publish(2.0, "destroy", "m", "", {})
    events.publish(3.0, "destroy", "other", "", {})
    assert [event.name for event in events.after(0)] == ["dev", "dev", ""]


async def test_waiters_wake_and_a_cancelled_one_is_forgotten():
    events = Events()
    one, two = (asyncio.create_task(events.wait(0)) for _ in range(2))
    await asyncio.sleep(0)
    two.cancel()
    await asyncio.gather(two, return_exceptions=True)
    events.publish(1.0, "die", "m", "dev", {"exit_code": 1})
    assert [event.action for event in await one] == ["die"]
    assert (await events.wait(0))[0].details == {"exit_code": 1}  # at once: it is there
