"""The window of a freeze: no message is lost, no snapshot is believed that should not be, nothing is frozen to nowhere."""

import asyncio
import shutil
import threading

import pytest

from recess.errors import OutOfSpace, Timeout
from recess.testing.session_world import appears, coder_world, deploy_coder, kinds, machine_of, notes


async def test_a_message_in_the_window_cancels_the_freeze(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        original = w.machines.snapshot

        async def snapshot(ref, **kwargs):
            taken = await original(ref, **kwargs)
            if kwargs.get("why") == "idle" and not w.sent:
                w.sent = True
                await w.sessions.send(s, "are you there", key="window")
            return taken

        w.sent = False
        w.machines.snapshot = snapshot
        await w.say(s, "hi", turn=1)
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert w.sent
        assert ("unpause", await machine_of(w, s)) in w.machines.calls
        assert notes(log)[0]["pid"] == notes(log)[1]["pid"]
        assert kinds(log).count("turn.start") == 2
        await w.until_state(s, "frozen")
        assert (await w.entries(s, "machine.snapshot"))[-1].position == (await w.log.get(s)).head


async def test_a_message_after_the_freeze_and_before_the_eviction_wakes_again(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        original = w.machines.evict

        async def evict(ref, **kwargs):
            if not w.sent:
                w.sent = True
                await w.sessions.send(s, "too late?", key="late")
            await original(ref, **kwargs)

        w.sent = False
        w.machines.evict = evict
        await w.say(s, "hi", turn=1)
        await w.until(s, "turn.end", count=2)
        both = notes(await w.entries(s))
        assert both[0]["pid"] == both[1]["pid"]
        assert both[1]["cache"] == [1, 2]


async def test_full_disk_keeps_the_session_warm_and_the_older_snapshot_valid(tmp_path):
    async with coder_world(tmp_path, freeze_retry_s=0.3) as (w, s):
        await w.say(s, "hi", turn=1)
        await w.until_state(s, "frozen")
        older = (await w.log.get(s)).snapshot
        w.machines.fail_next["snapshot"] = OutOfSpace("the blob store is full")
        await w.say(s, "again", turn=2)
        async with asyncio.timeout(10):
            while "failure" not in (await w.log.get(s)).meta:
                await w.log.wait(s, (await w.log.get(s)).head, 0.05)
        row = await w.log.get(s)
        assert row.state == "running"
        assert row.snapshot == older
        await w.until_state(s, "frozen")  # the next try holds
        assert (await w.log.get(s)).snapshot != older


async def test_an_explicit_suspend_says_what_the_store_said(tmp_path):
    async with coder_world(tmp_path, idle_timeout_s=60.0) as (w, s):
        await deploy_coder(w, tmp_path, "quiet", idle="60s")
        await w.say(s, "hi", turn=1)
        w.machines.fail_next["snapshot"] = OutOfSpace("the blob store is full")
        with pytest.raises(OutOfSpace):
            await w.sessions.suspend(s, timeout_s=10)
        assert (await w.sessions.suspend(s, timeout_s=10)).state == "frozen"
        assert (await w.sessions.suspend(s)).state == "frozen"  # twice is no error


async def test_suspend_waits_for_the_turn_and_gives_up_in_time(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        with pytest.raises(Timeout):
            await w.sessions.suspend(s, timeout_s=0.2)
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end")


async def test_parked_then_frozen_and_a_message_unparks(tmp_path):
    async with coder_world(tmp_path, park_s=0.5) as (w, s):
        await w.say(s, "hi", turn=1)
        await w.until_state(s, "parked")
        await w.say(s, "again", turn=2)
        both = notes(await w.entries(s))
        assert both[0]["pid"] == both[1]["pid"]
        assert (await w.entries(s, "machine.restore"))[1:] == []  # never left memory
        await w.until_state(s, "parked")
        await w.until_state(s, "frozen")


async def test_a_hold_keeps_the_machine_awake(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "hi", turn=1)
        with w.sessions.activity(s, "terminal"):
            await w.say(s, "again", turn=2)
            await asyncio.sleep(0.5)  # more than twice the idle time: it is the absence of a freeze that is tested
            assert (await w.log.get(s)).state == "running"
        await w.until_state(s, "frozen")


async def test_a_server_that_dies_while_a_snapshot_is_taken_leaves_a_machine_that_runs(tmp_path, monkeypatch):
    async with coder_world(tmp_path) as (w, s):
        begun, go, copy = threading.Event(), threading.Event(), shutil.copytree

        def slow(source, target):
            begun.set()
            go.wait(20)
            return copy(source, target)

        await w.say(s, "hi", turn=1)
        monkeypatch.setattr(shutil, "copytree", slow)
        assert await asyncio.to_thread(begun.wait, 20)
        died = asyncio.create_task(w.crash_server())
        await asyncio.sleep(0)
        go.set()
        await died
        assert (await w.log.get(s)).state == "running"
        await w.sessions.recover()
        both = notes(await w.say(s, "again", turn=2))
        assert both[0]["pid"] == both[1]["pid"]
