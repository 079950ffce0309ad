"""The ladder for real machines' rows over the fake driver: memory when it can be had, else the disk, and always why."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from recess.errors import BadInput, Corrupt, DriverFailed, IllegalState, Incompatible, NotFound, OutOfSpace
from recess.machines.keptdisk import KEPT_NAME
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL, machine_room


@pytest.fixture
async def room(tmp_path):
    async with machine_room(tmp_path) as opened:
        yield opened


def recovered(counts):
    assert (counts["unfinished"], counts["damaged"]) == (0, 0)
    return counts["adopted"], counts["lost"], counts["strays"]


def kept(room, row):
    return (room.parts.directory(row.id) / KEPT_NAME).exists()


async def write(room, ref, word):
    await room.sh(ref, f"echo {word} > /root/f; echo {word} > /dev/shm/f")


async def read(room, ref):
    return (await room.sh(ref, "cat /root/f; test -e /dev/shm/f && cat /dev/shm/f || echo none")).split()


async def dies(room, row):
    await room.host.vms[row.id].die("the host ran out of memory")
    await room.manager.wait_dead(row.id)


async def stopped(room, ref):
    await room.manager.stop(ref)
    return await room.manager.get(ref)


def damage(room, kind):
    """Flip a byte in the newest blob of a kind (lyr, vms)."""
    infos = [info for info in room.blobs.list_blobs() if kind in info.key]
    key = max(infos, key=lambda info: info.modified_s).key
    data = bytearray(room.blobs.get(key, max_bytes=1 << 30))
    data[len(data) // 3] ^= 0xFF
    room.blobs.delete(key)
    room.blobs.put(key, bytes(data))


@pytest.mark.parametrize("server", ["lives", "dies too"])
async def test_a_vm_that_dies_leaves_its_files(room, server):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    if server == "lives":
        await dies(room, row)
    else:
        await room.abandon()
        await room.host.vms[row.id].die("the host ran out of memory")
        await room.restart(killed=True)
    fallen = await room.manager.get("m1")
    assert (fallen.state, fallen.status.count("its disk is kept")) == ("dead", 1)
    assert kept(room, row)
    report = await room.manager.bring_back("m1", epoch=7)
    assert (report.rung, report.snapshot, report.log_position) == (4, "", 0)
    assert "its VM is gone" in report.why
    assert "memory and processes are gone" in report.why
    assert await read(room, "m1") == ["one", "none"]
    now = await room.manager.get("m1")
    assert (now.id, now.state, now.status, now.meta["epoch"]) == (row.id, "running", report.why, 7)
    assert not kept(room, row)


async def test_a_machine_that_was_booted_cold_is_a_machine_like_any_other(room):
    row = await room.manager.create(replace(SMALL, ports=(("127.0.0.1", 0, 8000),)), name="m1")
    await write(room, "m1", "one")
    await dies(room, row)
    await room.manager.bring_back("m1")
    await write(room, "m1", "two")
    assert recovered(await room.restart(killed=True)) == (1, 0, 0)
    assert await read(room, "m1") == ["two", "two"]
    (child,) = await room.manager.fork("m1")
    assert await read(room, child.id) == ["two", "two"]
    snap = await room.manager.suspend("m1")
    assert (snap.template, kept(room, row)) == ("", False)
    await room.manager.verify_snapshot(snap.id)
    assert (await room.manager.bring_back("m1")).rung == 2
    assert await read(room, "m1") == ["two", "two"]
    assert recovered(await room.restart()) == (2, 0, 0)
    copy, report = await room.manager.restore(snap.id, name="copy")
    assert report.rung == 2
    assert await read(room, copy.id) == ["two", "two"]
    await room.manager.pause("copy")
    assert (await room.manager.bring_back("copy")).rung == 1


async def test_the_main_process_is_started_anew(room):
    row = await room.manager.create(replace(SMALL, argv=("sh", "-c", "echo hello; sleep 1000")), name="job")
    await dies(room, row)
    await room.manager.bring_back("job")
    while (await room.manager.output("job")).data.count(b"hello") < 2:
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_machine_that_was_ended_comes_back_with_its_files(room, end):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    if end == "stop":
        await room.manager.stop("m1")
    else:
        await room.manager.kill(row.id, why="does not answer")
    assert kept(room, row)
    assert not (room.parts.directory(row.id) / "disk.raw").exists()
    assert (await room.manager.bring_back(row.id)).rung == 4
    assert await read(room, "m1") == ["one", "none"]
    await room.manager.remove("m1", force=True)
    assert not room.parts.directory(row.id).exists()


async def test_memory_comes_first_and_files_on_demand(room):
    """A crash after a snapshot: the snapshot by default; the newer files without memory for who asks for them."""
    row = await room.manager.create(SMALL, name="m1")
    for word, rungs, expected in (("a", (1, 2, 3, 4), ["snap", "snap"]), ("b", (4,), ["b", "none"])):
        await write(room, "m1", "snap")
        await room.manager.snapshot("m1")
        await write(room, "m1", word)
        await dies(room, row)
        assert "resume --disk" in (await room.manager.get("m1")).status
        await room.manager.bring_back("m1", rungs=rungs)
        assert await read(room, "m1") == expected
        assert not kept(room, row)


async def test_an_unreadable_memory_falls_to_the_disk_of_the_snapshot(room):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    snap = await room.manager.suspend("m1")
    damage(room, "vms")
    with pytest.raises(Corrupt):
        await room.manager.resume("m1")
    report = await room.manager.bring_back("m1")
    assert (report.rung, report.snapshot) == (4, snap.id)
    assert f"memory {snap.id[:16]} cannot be used" in report.why
    assert await read(room, "m1") == ["one", "none"]
    assert (await room.manager.get("m1")).id == row.id


async def test_a_snapshot_of_another_vmm_gives_its_disk_even_without_its_templates_memory(room):
    await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    snap = await room.manager.snapshot("m1", name="keep:v1", log_position=5)
    await room.manager.suspend("m1")
    await room.restart()
    room.driver.version = "2"
    for folder in (room.parts.run_dir / "templates").iterdir():
        for path in folder.iterdir():
            path.unlink()  # as after a reboot; and its memory is never rebuilt
    with pytest.raises(Incompatible):
        await room.manager.resume("m1")
    report = await room.manager.bring_back("m1", snapshots=[snap.id], own_disk=False)
    assert (report.rung, report.snapshot, report.log_position) == (4, snap.id, 5)
    assert "version" in report.why
    assert await read(room, "m1") == ["one", "none"]
    with pytest.raises(Incompatible):
        await room.manager.restore("keep:v1", name="copy")
    copy, report = await room.manager.restore("keep:v1", name="copy", disk_only=True)
    assert report.rung == 4
    assert await read(room, copy.id) == ["one", "none"]
    again, _ = await room.manager.restore("keep:v1", machine_id=(await stopped(room, "copy")).id, disk_only=True)
    assert again.id == copy.id


async def test_nothing_left_is_said_with_every_reason(room):
    row = await room.manager.create(SMALL, name="m1")
    await room.manager.kill(row.id, why="test")
    (room.parts.directory(row.id) / KEPT_NAME).unlink()
    with pytest.raises(IllegalState, match="nothing is left") as none:
        await room.manager.bring_back(row.id)
    assert "dead: test" in none.value.hint
    with pytest.raises(NotFound) as caught:
        await room.manager.bring_back(row.id, snapshots=["snp_gone"])
    assert len(caught.value.details["reasons"]) == 2
    with pytest.raises(BadInput):
        await room.manager.bring_back(row.id, rungs=(5,))
    assert (await room.manager.get(row.id)).state == "dead"


async def test_what_runs_or_is_parked_is_not_touched(room):
    await room.manager.create(SMALL, name="m1")
    with pytest.raises(IllegalState, match="is running"):
        await room.manager.bring_back("m1")
    await room.manager.pause("m1")
    with pytest.raises(IllegalState):
        await room.manager.bring_back("m1", rungs=(4,))
    assert (await room.manager.bring_back("m1")).rung == 1


async def test_a_passing_fault_does_not_lead_down_and_says_what_would(room):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    await room.manager.snapshot("m1")
    await write(room, "m1", "two")
    await dies(room, row)
    room.host.die_at = "restore"
    with pytest.raises(DriverFailed) as caught:
        await room.manager.bring_back("m1")
    assert "--disk" in caught.value.hint
    room.host.die_at = "boot"
    with pytest.raises(DriverFailed):
        await room.manager.bring_back("m1", rungs=(4,))
    assert kept(room, row)
    assert not (room.parts.directory(row.id) / "disk.raw").exists()
    assert (await room.manager.bring_back("m1", rungs=(4,))).rung == 4
    assert await read(room, "m1") == ["two", "none"]


async def test_a_disk_of_the_wrong_size_is_not_booted(room):
    row = await room.manager.create(SMALL, name="m1")
    await room.manager.kill(row.id, why="test")
    with (room.parts.directory(row.id) / KEPT_NAME).open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(Corrupt, match="bytes"):
        await room.manager.bring_back(row.id)


async def test_an_image_that_is_gone_is_replaced_by_its_name_and_that_is_said(room, monkeypatch):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    await dies(room, row)
    images = room.parts.images

    async def changed(image):
        files = await type(images).boot_files(images, image)
        return replace(files, root_hash="f" * 64)

    async def gone(root, kernel, initrd):
        raise NotFound("no such root", kind="root", ref=root)

    monkeypatch.setattr(images, "boot_files", changed)
    report = await room.manager.bring_back("m1")
    assert "as it is now" not in report.why  # its own root is there by hash
    assert (await room.manager.get("m1")).meta["vm"]["root"] == row.meta["vm"]["root"]
    await dies(room, row)
    monkeypatch.setattr(images, "boot_files_by_hash", gone)
    report = await room.manager.bring_back("m1")
    assert "its root is the image base as it is now" in report.why
    assert await read(room, "m1") == ["one", "none"]


@pytest.mark.parametrize("point", ["machines.before_cold_boot", "machines.started"])
async def test_a_server_that_dies_in_a_cold_boot_loses_no_file(room, point):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    await dies(room, row)
    with crashing(point):
        await room.manager.bring_back("m1")
    await room.restart(killed=True)
    assert room.host.vms == {}
    assert (await room.manager.get(row.id)).state == "dead"
    assert (await room.manager.bring_back("m1")).rung == 4
    assert await read(room, "m1") == ["one", "none"]


async def test_a_server_that_dies_between_row_and_drop_leaves_a_whole_machine(room):
    row = await room.manager.create(SMALL, name="m1")
    await write(room, "m1", "one")
    await dies(room, row)
    with crashing("machines.running"):
        await room.manager.bring_back("m1")
    assert recovered(await room.restart(killed=True)) == (1, 0, 0)
    await write(room, "m1", "two")
    await dies(room, row)
    await room.manager.bring_back("m1")
    assert await read(room, "m1") == ["two", "none"]


async def test_a_full_store_disk_during_the_unpacking_is_said(room, monkeypatch):
    await room.manager.create(SMALL, name="m1")
    await room.manager.suspend("m1")

    def full(*args, **options):
        raise OutOfSpace("no space to unpack")

    monkeypatch.setattr(type(room.parts.store), "materialise", full)
    with pytest.raises(OutOfSpace):
        await room.manager.bring_back("m1", rungs=(4,))
    assert (await room.manager.get("m1")).state == "suspended"


async def test_one_that_exited_and_was_brought_back_at_once_is_not_ended_by_its_earlier_exit(room):
    row = await room.manager.create(
        replace(SMALL, argv=("sh", "-c", "test -e /root/once && sleep 1000; echo > /root/once"))
    )
    while (await room.manager.get(row.id)).state != "exited":
        await asyncio.sleep(0.001)
    assert (await room.manager.bring_back(row.id)).rung == 4
    vm = room.host.vms[row.id]
    await asyncio.wait(list(room.manager.fleet._aside), timeout=5)
    assert room.host.vms[row.id] is vm
    assert (await room.manager.get(row.id)).state == "running"
