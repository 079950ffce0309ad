"""Forks and rewinds of real agent processes (the memory half is tested on machines)."""

import pytest

from recess.errors import BadInput, IllegalState, Incompatible
from recess.testing.session_world import coder_world, kinds, machine_of, notes, texts


async def test_fork_of_a_frozen_session_goes_its_own_way(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "hi", turn=1)
        await w.until_state(s, "frozen")
        head = (await w.log.get(s)).head
        child = await w.sessions.fork(s, name="variant")
        assert (child.state, child.parent, child.fork_position, child.name) == ("frozen", s, head, "variant")
        assert child.snapshot == (await w.log.get(s)).snapshot
        await w.say(child.id, "left", turn=2)
        await w.sessions.send(s, "right", key="m2")
        await w.until(s, "turn.end", count=2)
        mine, theirs = await w.entries(child.id), await w.entries(s)
        assert [e.position for e in mine[:head]] == [e.position for e in theirs[:head]]
        assert texts(mine)[-1] == "hello to left"
        assert texts(theirs)[-1] == "hello to right"
        assert mine[head].kind == "fork"
        assert mine[head].body == {"parent": s, "at": head}
        assert (await w.log.get(child.id)).meta["machine"] != (await w.log.get(s)).meta["machine"]


async def test_fork_of_a_live_session_snapshots_and_goes_on(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        with w.sessions.activity(s, "not live yet, no effect"):
            await w.say(s, "hi", turn=1)
        with w.sessions.activity(s, "terminal"):
            child = await w.sessions.fork(s)
            assert child.snapshot
            await w.say(s, "on", turn=2)
        both = notes(await w.entries(s))
        assert both[0]["pid"] == both[1]["pid"]
        assert both[1]["cache"] == [1, 2]
        assert [e.body["child"] for e in await w.entries(s, "fork")] == [child.id]
        await w.say(child.id, "child", turn=2)
        assert texts(await w.entries(child.id)) == ["hello to hi", "hello to child"]


async def test_a_fork_without_a_machine_whose_snapshot_is_incompatible_boots_its_disk(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "hi", turn=1)
        await (await w.machines.link(await machine_of(w, s))).write_file("/root/kept", b"the parent's file")
        await w.until_state(s, "frozen")
        child = await w.sessions.fork(s)
        w.machines.fail_next["restore"] = Incompatible("another CPU")
        await w.say(child.id, "there?", turn=2)
        restore = (await w.entries(child.id, "machine.restore"))[-1]
        assert (restore.body["rung"], restore.body["stale"]) == (4, False)
        assert "restore failed: another CPU" in restore.body["why"]
        assert restore.body["lost"] == "processes and memory of before; no file"
        machine = await machine_of(w, child.id)
        assert machine != await machine_of(w, s)
        assert await (await w.machines.link(machine)).read_file("/root/kept") == b"the parent's file"


async def test_fork_at_a_position_takes_the_newest_snapshot_that_is_not_newer(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await w.until_state(s, "frozen")
        first = await w.log.get(s)
        await w.say(s, "two", turn=2)
        await w.until_state(s, "frozen")
        end_of_two = [e for e in await w.entries(s) if e.kind == "turn.end"][1].position
        child = await w.sessions.fork(s, at=end_of_two)
        assert (child.snapshot, child.snapshot_position) == (first.snapshot, first.snapshot_position)
        await w.say(child.id, "three", turn=3)
        restore = (await w.entries(child.id, "machine.restore"))[-1]
        assert restore.body["stale"] is True
        assert "files" in restore.body["lost"]
        early = await w.sessions.fork(s, at=1)
        assert (early.state, early.snapshot) == ("cold", "")
        with pytest.raises(BadInput):
            await w.sessions.fork(s, at=10_000)


async def test_rewind_cuts_the_branch_and_keeps_the_log(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await w.until_state(s, "frozen")
        mark = (await w.log.get(s)).head
        await w.say(s, "two", turn=2)
        await w.until_state(s, "frozen")
        before = len(await w.entries(s))
        row = await w.sessions.rewind(s, to=mark)
        assert row.snapshot_position == mark
        assert len(await w.entries(s)) == before + 1
        await w.say(s, "three", turn=3)
        assert kinds(await w.entries(s)).count("turn.end") == 3


async def test_close_ends_everything_but_the_log(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        row = await w.sessions.close(s)
        assert row.state == "closed"
        assert w.machines.machines == {}
        assert (await w.sessions.close(s)).state == "closed"
        with pytest.raises(IllegalState):
            await w.sessions.send(s, "hello?")
        with pytest.raises(IllegalState):
            await w.sessions.resume(s)
        assert texts(await w.sessions.read(s)) == ["hello to one"]
        assert [item.position async for item in w.sessions.follow(s)] == [e.position for e in await w.entries(s)]
