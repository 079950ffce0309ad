"""Servers that die at awkward moments: machines are adopted, fall, or are cleaned up; nothing without a row survives."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from recess.errors import DriverFailed, GuestFailed
from recess.guestlink.link import ExecRequest
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL, machine_room


@pytest.fixture
async def room(tmp_path):
    async with machine_room(tmp_path) as opened:
        yield opened


def recovered(counts):
    return counts["adopted"], counts["lost"], counts["strays"]


@pytest.mark.parametrize("killed", [False, True])
async def test_running_machines_are_adopted_with_their_processes(room, killed):
    row = await room.manager.create(replace(SMALL, ports=(("127.0.0.1", 0, 8000),)), name="dev")
    await room.sh("dev", "echo nonce > /dev/shm/nonce")
    link = await room.manager.link(row.id)
    await link.exec(ExecRequest(argv=["sleep", "1000"], job_id="sleeper"))
    assert recovered(await room.restart(killed=killed)) == (1, 0, 0)
    assert (await room.manager.get("dev")).state == "running"
    assert await room.sh("dev", "cat /dev/shm/nonce") == "nonce\n"
    jobs = await (await room.manager.link(row.id)).jobs()
    assert [j.job_id for j in jobs if j.exit_code is None] == ["sleeper"]
    snap = await room.manager.snapshot("dev")
    await room.manager.restore(snap.id, name="copy")
    assert await room.sh("copy", "cat /dev/shm/nonce") == "nonce\n"


async def test_a_parked_machine_stays_parked_over_a_restart(room):
    row = await room.manager.create(SMALL, name="parked")
    await room.manager.pause("parked")
    await room.restart(killed=True)
    assert (await room.manager.get("parked")).state == "paused"
    assert not room.host.vms[row.id].guest.vcpus.is_set()
    await room.manager.resume("parked")
    assert await room.sh("parked", "echo awake") == "awake\n"


async def test_output_is_logged_once_over_a_restart_and_a_resume(room):
    async def counter(process, argv):
        for n in range(process.memory.get("n", 0), 1000):
            process.memory["n"] = n + 1
            await process.write(1, f"line {n}\n".encode())
            await process.sleep_until(process.guest.uptime_s() + 0.002)
        return 0

    room.driver.programs["counter"] = counter
    row = await room.manager.create(replace(SMALL, argv=("counter",)), name="job")

    async def lines(count):
        while len(found := (await room.manager.output("job")).data.splitlines()) < count:
            await asyncio.sleep(0.002)
        return found

    await lines(3)
    await room.restart(killed=True)
    await lines(8)
    await room.manager.suspend("job")
    await room.manager.resume("job")
    found = await lines(15)
    assert found == [f"line {n}".encode() for n in range(len(found))]
    snap = await room.manager.snapshot("job")
    await lines(len(found) + 5)
    await room.manager.kill("job", why="test")
    before = (await room.manager.output("job")).data
    await room.manager.restore(snap.id, machine_id=row.id)
    after = await lines(len(before.splitlines()) + 3)
    assert b"\n".join(after).startswith(before.rstrip(b"\n"))


async def test_a_main_process_that_ended_while_no_server_was_there(room):
    row = await room.manager.create(replace(SMALL, argv=("sleep", "1000")), name="job")
    await room.abandon()
    room.host.vms[row.id].guest.signal("main", 9)
    await room.restart(killed=True)
    while (found := await room.manager.get("job")).state == "running":
        await asyncio.sleep(0.001)
    assert (found.state, found.exit_code) == ("exited", 137)


async def test_machines_whose_vm_is_gone_fall(room):
    plain = await room.manager.create(SMALL, name="plain")
    saved = await room.manager.create(SMALL, name="saved")
    await room.sh("saved", "echo one > /root/f")
    await room.manager.snapshot("saved")
    await room.abandon()
    for row in (plain, saved):
        await room.host.vms[row.id].die("the host was rebooted")
    assert recovered(await room.restart(killed=True)) == (0, 2, 0)
    assert (await room.manager.get("plain")).state == "dead"
    assert (await room.manager.get("saved")).state == "suspended"
    report = await room.manager.resume("saved")
    assert "lost" in report.why
    assert await room.sh("saved", "cat /root/f") == "one\n"


async def test_a_host_reboot_takes_the_template_cache_and_it_is_rebuilt_byte_for_byte(room):
    await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo x > /dev/shm/x")
    snap = await room.manager.suspend("m1")
    (folder,) = (room.parts.run_dir / "templates").iterdir()
    before = {name: (folder / name).read_bytes() for name in ("ram", "disk", "vmstate")}
    await room.restart()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    await room.manager.resume("m1")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert await room.sh("m1", "cat /dev/shm/x") == "x\n"
    assert snap.template


async def test_a_cached_template_of_the_wrong_size_is_not_used(room):
    await room.manager.create(SMALL, name="m1")
    (folder,) = (room.parts.run_dir / "templates").iterdir()
    await room.restart()
    (folder / "ram").write_bytes(b"short")
    await room.manager.create(SMALL, name="m2")
    assert await room.sh("m2", "echo fine") == "fine\n"
    assert any("rebuilding" in line for line in room.lines)


@pytest.mark.parametrize("point", ["machines.started", "templates.stored"])
async def test_a_crash_while_a_machine_is_made_leaves_nothing(room, point):
    with crashing(point):
        await room.manager.create(SMALL, name="half")
    assert (await room.restart(killed=True))["unfinished"] == 1
    assert await room.manager.list_machines(everything=True) == []
    assert room.host.vms == {}
    assert list(room.parts.machines_dir.iterdir()) == []
    await room.manager.create(SMALL, name="half")


async def test_a_crash_after_the_bytes_and_before_the_row_keeps_the_older_snapshot(room):
    await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo one > /root/f")
    first = await room.manager.snapshot("m1")
    await room.sh("m1", "echo two > /root/f")
    with crashing("machines.stored"):
        await room.manager.suspend("m1")
    await room.restart(killed=True)
    row = await room.manager.get("m1")
    assert (row.state, row.snapshot) == ("running", first.id)
    assert await room.sh("m1", "cat /root/f") == "two\n"
    assert [s.id for s in await room.manager.list_snapshots()] == [first.id]
    swept = await room.manager.collect(grace_s=0.0)
    assert sum(swept.values()) > 0
    await room.manager.verify_snapshot(first.id)


async def test_a_crash_between_the_rows_and_the_end_of_the_vm_is_not_a_loss(room):
    row = await room.manager.create(SMALL, name="m1")
    with crashing("machines.evicted"):
        await room.manager.suspend("m1")
    assert row.id in room.host.vms
    assert (await room.restart(killed=True))["strays"] == 1
    assert room.host.vms == {}
    found = await room.manager.get("m1")
    assert (found.state, found.status) == ("suspended", "")
    assert (await room.manager.resume("m1")).rung == 2


async def test_a_vmm_that_dies_at_every_step_is_a_typed_error_and_leaves_nothing(room):
    room.host.die_at = "boot"
    with pytest.raises(DriverFailed):
        await room.manager.create(SMALL, name="m1")
    assert not list((room.parts.run_dir / "templates").iterdir())
    room.host.die_at = "restore"
    with pytest.raises(DriverFailed):
        await room.manager.create(SMALL, name="m1")
    assert await room.manager.list_machines(everything=True) == []
    await room.manager.create(SMALL, name="m1")
    room.host.die_at = "capture"
    with pytest.raises(DriverFailed):
        await room.manager.suspend("m1")
    assert await room.sh("m1", "echo up") == "up\n"
    snap = await room.manager.suspend("m1")
    room.host.die_at = "restore"
    with pytest.raises(DriverFailed):
        await room.manager.resume("m1")
    assert (await room.manager.get("m1")).state == "suspended"
    assert (await room.manager.resume("m1")).snapshot == snap.id


async def test_cancelled_at_every_step_nothing_is_left(room):
    await room.manager.create(SMALL, name="warm")
    for steps in range(0, 400, 7):
        task = asyncio.create_task(room.manager.create(SMALL, name="ctrl-c"))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(done, BaseException):
            await room.manager.remove("ctrl-c", force=True)
        assert [r.name for r in await room.manager.list_machines(everything=True)] == ["warm"]
        assert len(room.host.vms) == 1


async def test_a_guest_that_cannot_wake_after_a_capture_is_not_served(room, monkeypatch):
    from recess.drivers.fake.link import FakeLink

    await room.manager.create(SMALL, name="m1")
    await room.manager.snapshot("m1")

    async def refuse(self):
        raise GuestFailed("unfreeze: no such cgroup")

    monkeypatch.setattr(FakeLink, "unfreeze", refuse)
    with pytest.raises(GuestFailed):
        await room.manager.snapshot("m1")
    row = await room.manager.get("m1")
    assert row.state == "suspended"
    assert "did not wake" in row.status
    assert room.host.vms == {}


async def test_corrupt_and_foreign_snapshots_are_refused_in_words(room):
    from recess.errors import Corrupt, Incompatible

    await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "head -c 20000 /dev/urandom > /root/noise")
    snap = await room.manager.suspend("m1")
    room.driver.version = "2"
    with pytest.raises(Incompatible, match="version"):
        await room.manager.resume("m1")
    room.driver.version = "1"
    layers = [info for info in room.blobs.list_blobs() if "lyr" in info.key]
    newest = max(layers, key=lambda info: info.modified_s).key
    data = bytearray(room.blobs.get(newest, max_bytes=1 << 30))
    data[len(data) // 3] ^= 0xFF
    room.blobs.delete(newest)
    room.blobs.put(newest, bytes(data))
    with pytest.raises(Corrupt):
        await room.manager.resume("m1")
    with pytest.raises(Corrupt):
        await room.manager.verify_snapshot(snap.id)
    assert (await room.manager.get("m1")).state == "suspended"
    assert room.host.vms == {}


async def test_templates_that_nobody_uses_give_their_memory_back(room):
    from recess.machines.templates import KEEP_CACHES

    for n in range(KEEP_CACHES + 2):
        await room.manager.create(replace(SMALL, image=f"image-{n}"), name=f"m{n}")
    folders = lambda: {p.name for p in (room.parts.run_dir / "templates").iterdir()}  # noqa: E731
    everything = folders()
    await room.restart()
    assert folders() == everything  # all of them have a machine
    for n in range(KEEP_CACHES + 2):
        await room.manager.suspend(f"m{n}")
    await room.restart()
    assert len(folders()) == KEEP_CACHES
    for n in range(KEEP_CACHES + 2):
        await room.manager.resume(f"m{n}")
    assert folders() == everything


async def test_templates_are_given_back_when_asked_but_not_from_under_a_start(room, monkeypatch):
    from recess.machines import templates

    await room.manager.create(SMALL, name="gone")
    await room.manager.create(replace(SMALL, image="other"), name="stays")
    await room.manager.suspend("gone")
    folders = lambda: len(list((room.parts.run_dir / "templates").iterdir()))  # noqa: E731
    found = room.manager.templates
    assert await found.evict(room.manager.templates_in_use(), keep=0) == 0  # it was handed out a moment ago
    monkeypatch.setattr(templates, "HANDED_S", 0.0)
    assert await found.evict(room.manager.templates_in_use(), keep=0) == 1
    assert folders() == 1
    await room.manager.resume("gone")
    assert folders() == 2


@pytest.mark.parametrize("point", ["machines.remove_noted", "machines.remove_ended", "machines.row_deleted"])
async def test_a_server_that_dies_while_a_machine_is_removed(room, point):
    row = await room.manager.create(SMALL, name="gone")
    other = await room.manager.create(SMALL, name="other")
    await room.manager.suspend("other")
    with crashing(point):
        await room.manager.remove("gone", force=True)
    await room.restart(killed=True)
    assert [r.id for r in await room.manager.list_machines(everything=True)] == [other.id]
    assert [path.name for path in room.parts.machines_dir.iterdir()] == [other.id]
    assert room.host.vms == {}
    await room.manager.create(SMALL, name="gone")
    assert row.id not in room.host.vms


async def test_a_server_that_dies_while_it_restores_to_a_new_machine(room):
    row = await room.manager.create(SMALL, name="m1")
    snap = await room.manager.suspend("m1")
    for options in ({}, {"disk_only": True}):
        with crashing("machines.started"):
            await room.manager.restore(snap.id, name="copy", **options)
        assert (await room.restart(killed=True))["unfinished"] == 1
        assert [r.id for r in await room.manager.list_machines(everything=True)] == [row.id]
        assert [path.name for path in room.parts.machines_dir.iterdir()] == [row.id]
        assert room.host.vms == {}
    assert (await room.manager.resume("m1")).rung == 2


async def test_a_server_that_dies_while_it_brings_back_older_memory_keeps_the_newer_disk(room):
    row = await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo old > /root/f")
    snap = await room.manager.snapshot("m1")
    await room.sh("m1", "echo new > /root/f")
    await room.manager.kill("m1", why="test")
    with crashing("machines.started"):
        await room.manager.restore(snap.id, machine_id=row.id)
    assert (await room.restart(killed=True))["strays"] == 1
    assert (await room.manager.get(row.id)).state == "dead"
    await room.manager.bring_back(row.id, rungs=(4,))
    assert await room.sh("m1", "cat /root/f") == "new\n"
