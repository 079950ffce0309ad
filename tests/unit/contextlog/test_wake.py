import asyncio

from recess.contextlog import wake
from recess.contextlog.wake import WakeHub
from recess.testing.clock import FakeClock, settle


async def never():
    return False


async def test_a_timeout_is_the_clocks():
    clock = FakeClock()
    hub = WakeHub(clock)
    waiting = asyncio.ensure_future(hub.wait("s", never, 30.0, None))
    await clock.advance(29.9)
    assert not waiting.done()
    await clock.advance(0.2)
    assert await waiting is False
    assert clock.sleepers == 0
    assert hub._waiting == {}


async def test_a_cancelled_waiter_leaves_nothing_behind():
    clock = FakeClock()
    hub = WakeHub(clock)
    waiting = asyncio.ensure_future(hub.wait("s", never, 30.0, None))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await settle()
    assert (hub._waiting, clock.sleepers) == ({}, 0)


async def test_a_change_between_the_look_and_the_wait_is_not_lost():
    hub = WakeHub(FakeClock())

    async def look():
        hub.notify("s")  # it happens right after the log was looked at
        return False

    assert await hub.wait("s", look, 30.0, None) is True


async def test_forgotten_tickets_wake_rather_than_sleep(monkeypatch):
    monkeypatch.setattr(wake, "_TICKETS_MAX", 2)
    hub = WakeHub(FakeClock())
    hub.notify("a")
    ticket = hub.ticket("a")
    hub.notify("a")
    for other in ("b", "c", "d"):
        hub.notify(other)
    assert hub.ticket("a") > ticket
    assert await hub.wait("a", never, 0.0, ticket) is True


async def test_a_waiter_in_another_loop_is_woken():
    hub = WakeHub(FakeClock())
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def other():
        async def look():
            loop.call_soon_threadsafe(ready.set)
            return False

        return await hub.wait("s", look, 30.0, None)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, other()))
    await ready.wait()
    hub.notify("s")
    assert await thread is True
