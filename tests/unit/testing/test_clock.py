import asyncio

import pytest

from recess.testing.clock import FakeClock


async def test_sleepers_wake_in_order_at_their_own_time():
    clock, woken = FakeClock(100.0), []

    async def sleeper(name, *seconds):
        for s in seconds:
            await clock.sleep(s)
            woken.append((name, clock.monotonic_s()))

    tasks = [
        asyncio.create_task(sleeper("a", 2, 2)),
        asyncio.create_task(sleeper("b", 3)),
        asyncio.create_task(sleeper("c", 0)),
    ]
    await clock.advance(3.5)
    assert woken == [("c", 0.0), ("a", 2.0), ("b", 3.0)]
    await clock.advance(0.5)
    assert woken[-1] == ("a", 4.0)
    assert (clock.wall_s(), clock.sleepers) == (104.0, 0)
    await asyncio.gather(*tasks)


async def test_a_cancelled_sleeper_is_forgotten():
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(1))
    await asyncio.sleep(0)
    assert clock.sleepers == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert clock.sleepers == 0
    await clock.advance(2)


async def test_the_wall_may_jump_and_the_monotonic_clock_may_not():
    clock = FakeClock(1000.0)
    clock.jump_wall(-500.0)
    assert (clock.wall_s(), clock.monotonic_s()) == (500.0, 0.0)
    with pytest.raises(ValueError, match="does not go back"):
        await clock.advance(-1)
