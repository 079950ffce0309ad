"""Docker's everyday acts: create without a start, start again, wait, rename, signal, rewind, restart policies, events."""

import asyncio
from dataclasses import replace

import pytest

from recess.errors import BadInput, Corrupt, IllegalState, InvalidSpec, NameInUse, NotFound
from recess.machines.bringback import BringBack
from recess.machines.service import Changes
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL


async def test_created_is_claimed_and_nothing_runs_until_it_is_started(room):
    acts = room.manager.acts
    row = await acts.prepare(replace(SMALL, argv=("sh", "-c", "exit 4")), name="job")
    assert (row.state, room.host.vms) == ("created", {})
    with pytest.raises(NameInUse):
        await acts.prepare(SMALL, name="job")
    with pytest.raises(InvalidSpec):
        await acts.prepare(replace(SMALL, cpus=0))
    with pytest.raises(IllegalState, match="created"):
        await room.manager.link(row.id)
    assert [one.name for one in await room.manager.list_machines()] == []
    assert await acts.wait("job") == 0  # it has not run
    assert await acts.start("job") is None
    assert await acts.wait("job") == 4


async def test_a_start_that_fails_leaves_it_created_and_may_be_tried_again(room):
    spec = replace(SMALL, argv=("no-such-program",))
    row = await room.manager.acts.prepare(spec, name="job")
    with pytest.raises(NotFound):
        await room.manager.acts.start("job")
    assert (await room.manager.get("job")).state == "created"
    assert room.host.vms == {}
    await room.manager.remove(row.id)
    assert not list(room.parts.machines_dir.glob("mch_*"))


async def test_an_ended_machine_boots_again_from_its_disk(room):
    await room.manager.create(replace(SMALL, argv=("sh", "-c", "echo more >> /root/notes; exit 1")), name="job")
    assert await room.manager.acts.wait("job") == 1
    report = await room.manager.acts.start("job")
    assert (report.rung, "files are kept" in report.why) == (4, True)
    assert await room.manager.acts.wait("job") == 1
    await room.manager.acts.start("job")
    assert await room.sh("job", "cat /root/notes") == "more\nmore\nmore\n"


async def test_a_start_of_what_runs_is_nothing_of_what_is_suspended_a_resume(room):
    await room.manager.create(SMALL, name="dev")
    assert await room.manager.acts.start("dev") is None
    await room.manager.pause("dev")
    with pytest.raises(IllegalState, match="paused"):
        await room.manager.acts.start("dev")
    await room.manager.unpause("dev")
    await room.sh("dev", "touch /tmp/there")
    await room.manager.suspend("dev")
    report = await room.manager.acts.start("dev")
    assert report.rung == 2
    assert 0 < report.timings_s["first_reply"] <= report.seconds
    await room.sh("dev", "cat /tmp/there")


async def test_waiting_ends_with_a_stop_a_kill_or_a_removal(room):
    for name in ("one", "two", "three"):
        await room.manager.create(replace(SMALL, argv=("sleep", "1000")), name=name)
    waits = [asyncio.create_task(room.manager.acts.wait(name)) for name in ("one", "two", "three")]
    await asyncio.sleep(0)
    await room.manager.suspend("one")
    await room.manager.resume("one")
    await room.manager.stop("one")
    await room.manager.kill("two", why="enough")
    await room.manager.remove("three", force=True)
    assert await asyncio.gather(*waits) == [143, 137, 137]


async def test_rename(room):
    row = await room.manager.create(SMALL, name="old")
    await room.manager.create(SMALL, name="taken")
    with pytest.raises(NameInUse):
        await room.manager.acts.rename("old", "taken")
    with pytest.raises(BadInput):
        await room.manager.acts.rename("old", "")
    await room.manager.acts.rename("old", "new")
    assert (await room.manager.get("new")).id == row.id
    await room.manager.suspend("new")
    await room.manager.resume("new")
    assert "new" in await room.sh("new", "hostname")


async def test_signals_go_to_the_main_process(room):
    await room.manager.create(replace(SMALL, argv=("sleep", "1000")), name="job")
    await room.manager.acts.signal("job", 10)
    assert await room.manager.acts.wait("job") == 138
    await room.manager.create(SMALL, name="plain")
    with pytest.raises(IllegalState, match="main process"):
        await room.manager.acts.signal("plain", 15)


async def test_rewind_moves_the_machine_and_loses_nothing(room):
    row = await room.manager.create(SMALL, name="dev")
    with pytest.raises(NotFound, match="no snapshot"):
        await room.manager.acts.rewind("dev")
    await room.sh("dev", "echo one > /root/state")
    first = await room.manager.snapshot("dev", name="first")
    await room.sh("dev", "echo two > /root/state")
    kept, report = await room.manager.acts.rewind("dev", "first")
    assert report.snapshot == first.id
    assert await room.sh("dev", "cat /root/state") == "one\n"
    assert (await room.manager.get("dev")).id == row.id
    await room.manager.acts.rewind("dev", kept.id)
    assert await room.sh("dev", "cat /root/state") == "two\n"
    other = await room.manager.create(SMALL, name="other")
    with pytest.raises(BadInput, match="not of machine"):
        await room.manager.acts.rewind(other.id, "first")


async def test_a_rewind_that_cannot_be_done_leaves_the_machine_as_it_was(room, monkeypatch):
    await room.manager.create(SMALL, name="dev")
    await room.manager.snapshot("dev", name="first")
    await room.sh("dev", "echo now > /root/state")

    async def damaged(self, record, row, epoch, *, before=""):
        raise Corrupt("a frame is not what was written")

    monkeypatch.setattr(BringBack, "restore_as", damaged)
    with pytest.raises(Corrupt):
        await room.manager.acts.rewind("dev", "first")
    assert (await room.manager.get("dev")).state == "running"
    assert await room.sh("dev", "cat /root/state") == "now\n"


async def test_a_server_that_dies_in_a_rewind_leaves_the_machine_suspended_as_it_was(room):
    await room.manager.create(SMALL, name="dev")
    await room.manager.snapshot("dev", name="first")
    await room.sh("dev", "echo now > /root/state")
    with crashing("machines.rewind_put_away"):
        await room.manager.acts.rewind("dev", "first")
    await room.restart(killed=True)
    assert (await room.manager.get("dev")).state == "suspended"
    await room.manager.resume("dev")
    assert await room.sh("dev", "cat /root/state") == "now\n"


async def test_restart_policies_start_the_process_again_in_the_same_machine(room):
    script = "echo x >> /root/runs; test $(wc -l < /root/runs) = 3"
    spec = replace(SMALL, argv=("sh", "-c", script), restart="on-failure:5")
    row = await room.manager.create(spec, name="job")
    assert await room.manager.acts.wait("job") in (0, 1)
    told = [event.action for event in room.manager.events.after(0) if event.id == row.id]
    assert told.count("restart") in (2, 5)
    assert told[-1] == "die"
    with pytest.raises(InvalidSpec, match="restart"):
        await room.manager.create(replace(SMALL, restart="always"))


async def test_stop_ends_a_process_that_is_always_started_again(room):
    await room.manager.create(replace(SMALL, argv=("sleep", "1000"), restart="always"), name="server")
    seen = room.manager.events.newest
    await room.manager.acts.signal("server", 9)
    while not any(event.action == "restart" for event in await room.manager.events.wait(seen)):
        seen = room.manager.events.newest
    assert (await room.manager.get("server")).state == "running"
    await room.manager.stop("server")
    assert (await room.manager.get("server")).state == "exited"
    assert room.host.vms == {}


async def test_a_restored_machine_takes_other_settings(room):
    spec = replace(SMALL, env={"A": "1", "B": "1"}, labels={"team": "x"}, ports=(("127.0.0.1", 0, 80),))
    await room.manager.create(spec, name="dev")
    await room.manager.snapshot("dev", name="first")
    changes = Changes(env={"B": "2"}, labels={"new": "y"}, ports=())
    row, _ = await room.manager.restore("first", name="copy", changes=changes)
    assert (row.spec.env, row.spec.labels, row.spec.ports) == ({"A": "1", "B": "2"}, {"team": "x", "new": "y"}, ())
    assert await room.sh("copy", "echo $A$B$RECESS_NAME") == "12copy\n"
    with pytest.raises(InvalidSpec):
        await room.manager.restore("first", changes=Changes(env={"": "x"}))


async def test_processes_are_listed(room):
    await room.manager.create(replace(SMALL, argv=("sleep", "1000")), name="job")
    assert [one.command for one in await room.manager.processes("job")] == ["sleep 1000"]


async def test_a_reboot_gives_more_memory_and_another_image_and_keeps_the_disk(room):
    row = await room.manager.create(SMALL, name="dev")
    await room.sh("dev", "echo kept > /root/notes")
    report = await room.manager.reboot("dev", memory_bytes=2 * SMALL.memory_bytes, epoch=7)
    assert (report.rung, "files are kept" in report.why) == (4, True)
    after = await room.manager.get("dev")
    assert (after.id, after.state, after.spec.memory_bytes) == (row.id, "running", 2 * SMALL.memory_bytes)
    assert after.meta["vm"]["memory_bytes"] == 2 * SMALL.memory_bytes
    assert await room.sh("dev", "cat /root/notes") == "kept\n"
    await room.manager.reboot("dev", image="other")
    other = await room.manager.get("dev")
    assert other.spec.image == "other"
    assert (
        other.meta["vm"]["root"] == (await room.parts.images.boot_files("other")).root_hash != after.meta["vm"]["root"]
    )
    assert await room.sh("dev", "cat /root/notes") == "kept\n"


async def test_a_reboot_that_cannot_be_touches_nothing(room):
    await room.manager.create(SMALL, name="dev")
    await room.sh("dev", "echo kept > /tmp/notes")
    with pytest.raises(InvalidSpec):
        await room.manager.reboot("dev", memory_bytes=1)
    with pytest.raises(NotFound):
        await room.manager.reboot("dev", image="missing")
    assert (await room.manager.get("dev")).spec == SMALL
    assert await room.sh("dev", "cat /tmp/notes") == "kept\n", "it runs on"
    await room.manager.suspend("dev")
    with pytest.raises(IllegalState, match="suspended"):
        await room.manager.reboot("dev", memory_bytes=2 * SMALL.memory_bytes)


async def test_a_server_that_dies_in_a_reboot_leaves_a_machine_that_boots_as_it_was_to_be(room):
    await room.manager.create(SMALL, name="dev")
    await room.sh("dev", "echo kept > /root/notes")
    with crashing("machines.reboot_noted"):
        await room.manager.reboot("dev", memory_bytes=2 * SMALL.memory_bytes)
    await room.restart()
    assert (await room.manager.get("dev")).state == "exited"
    await room.manager.bring_back("dev", rungs=(4,))
    assert (await room.manager.get("dev")).meta["vm"]["memory_bytes"] == 2 * SMALL.memory_bytes
    assert await room.sh("dev", "cat /root/notes") == "kept\n"
