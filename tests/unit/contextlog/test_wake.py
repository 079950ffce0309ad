import asyncio
import threading

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


async def test_the_last_waiter_of_one_loop_takes_no_newcomer_of_another_along():
    hub, inside, left = WakeHub(FakeClock()), threading.Event(), threading.Event()

    class Racing(dict):
        def setdefault(self, session, fresh):
            found = super().setdefault(session, fresh)
            if found:  # the newcomer has its set, and is not yet in it
                loop.call_soon_threadsafe(go.set)
                left.wait(0.3)  # with the lock held, nobody can leave now
            return found

    hub._waiting = Racing()

    async def leaving():
        nonlocal loop, go
        loop, go = asyncio.get_running_loop(), asyncio.Event()

        async def look():
            inside.set()
            return await go.wait()

        await hub.wait("s", look, 30.0, None)
        left.set()

    loop = go = None
    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, leaving()))
    await asyncio.to_thread(inside.wait)
    newcomer = asyncio.create_task(hub.wait("s", never, 30.0, None))
    await thread
    await settle()
    hub.notify("s")
    async with asyncio.timeout(5):
        assert await newcomer is True
