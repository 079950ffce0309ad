"""A damaged row costs only itself: lists show it, the others work, nothing it may stand for is deleted, `rm` gives it up."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from recess.errors import Corrupt, IllegalState, NotFound
from recess.machines.leavings import LEFT_S, ROW_NAME
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL, machine_room

# What a flipped bit, another program or a newer version may leave: (column, SQL of its new value).
DAMAGE = {
    "no json": ("spec", "'{not json'"),
    "no utf-8": ("spec", "CAST(X'7bff' AS TEXT)"),
    "not its type": ("spec", '\'{"memory_bytes": "big"}\''),
    "meta is a list": ("meta", "'[]'"),
    "epoch is a word": ("meta", '\'{"epoch": "x"}\''),
    "a blob for a name": ("name", "X'00ff'"),
    "no such state": ("state", "'elsewhere'"),
}


@pytest.fixture
async def room(tmp_path):
    async with machine_room(tmp_path) as opened:
        yield opened


async def spoil(room, row_id, kind, table="catalog_machine"):
    column, value = DAMAGE.get(kind, kind)
    await room.parts.catalog.db.write(
        lambda tx: tx.execute(f"UPDATE {table} SET {column} = {value} WHERE id = ?", (row_id,))
    )


async def states(room, **options):
    return {row.id: row.state for row in await room.manager.list_machines(**options)}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("state", ["running", "suspended"])
async def test_the_others_go_on_and_nothing_of_it_is_touched(room, kind, state):
    bad = await room.manager.create(SMALL, name="bad")
    good = await room.manager.create(SMALL, name="good")
    await room.sh("bad", "echo kept > /root/f")
    snap = await room.manager.snapshot("bad")
    if state == "suspended":
        await room.manager.suspend("bad")
    await spoil(room, bad.id, kind)
    counts = await room.restart(killed=True)
    if state == "running" or kind == "no such state":
        assert counts["damaged"] == 1
    assert (counts["adopted"], counts["strays"]) == (1, 0)
    assert (bad.id in room.host.vms) == (state == "running")
    assert await states(room) == {bad.id: "damaged", good.id: "running"}
    assert await states(room, everything=True) == {bad.id: "damaged", good.id: "running"}
    (shown,) = [row for row in await room.manager.list_machines() if row.id == bad.id]
    assert bad.id in shown.status
    assert f"rm --force {bad.id}" in shown.meta["hint"]
    json.dumps(shown.meta)
    assert await room.sh("good", "echo fine") == "fine\n"
    await room.manager.create(SMALL, name="new")

    await room.manager.collect(grace_s=0.0)
    await room.manager.tidy()
    await room.manager.verify_snapshot(snap.id)
    assert room.parts.directory(bad.id).is_dir()
    assert (bad.id in room.host.vms) == (state == "running")


async def test_it_is_given_up_with_its_files_aside(room):
    row = await room.manager.create(replace(SMALL, argv=("sh", "-c", "echo said")), name="bad")
    while not (await room.manager.output("bad")).data:
        pass
    row = await room.manager.create(SMALL, name="worse")
    await spoil(room, row.id, "no json")
    await room.restart(killed=True)
    with pytest.raises(IllegalState, match="a VM"):
        await room.manager.remove(row.id)
    with crashing("machines.put_aside"):
        await room.manager.remove("worse", force=True)
    await room.restart(killed=True)
    assert (await states(room))[row.id] == "damaged"
    left = await room.manager.remove(row.id, force=True)
    assert left == str(room.parts.directory(row.id))
    assert row.id not in room.host.vms
    assert row.id not in await states(room, everything=True)
    folder = room.parts.directory(row.id)
    saved = json.loads((folder / ROW_NAME).read_text())
    assert (saved["name"], saved["spec"]) == ("worse", "{not json")
    assert (folder / "disk.kept").is_file()
    await room.restart()
    await room.manager.tidy()
    assert folder.is_dir()
    os.utime(folder / ROW_NAME, (0, room.parts.clock.wall_s() - LEFT_S - 1))
    assert (await room.manager.tidy())["folders"] == 1
    assert not folder.exists()
    with pytest.raises(NotFound):
        await room.manager.remove(row.id)


async def test_a_damaged_suspended_machine_still_holds_its_snapshot(room):
    row = await room.manager.create(SMALL, name="bad")
    snap = await room.manager.suspend("bad")
    await spoil(room, row.id, "no json")
    with pytest.raises(Exception, match="bad"):
        await room.manager.remove_snapshot(snap.id)
    await room.manager.verify_snapshot(snap.id)
    left = await room.manager.remove("bad")
    assert left
    copy, _ = await room.manager.restore(snap.id, name="copy")
    assert copy.state == "running"


async def test_a_damaged_snapshot_row_is_shown_and_its_bytes_are_kept(room):
    await room.manager.create(SMALL, name="m1")
    one = await room.manager.snapshot("m1", name="one:v1")
    two = await room.manager.suspend("m1")
    await spoil(room, one.id, ("figures", "'{'"), "catalog_snapshot")
    found = {row.id: row for row in await room.manager.list_snapshots()}
    assert found[one.id].why == "damaged"
    assert one.id in str(found[one.id].figures["hint"])
    assert found[two.id].why != "damaged"
    await room.restart()
    await room.manager.collect(grace_s=0.0)
    await room.manager.verify_snapshot(two.id)
    assert (await room.manager.resume("m1")).rung == 2
    with pytest.raises(Corrupt):
        await room.manager.get_snapshot(one.id)
    assert room.parts.store.verify(one.id)["files"] > 0


async def test_a_damaged_template_row_costs_a_new_template_and_no_machine(room):
    row = await room.manager.create(SMALL, name="m1")
    await room.sh("m1", "echo x > /dev/shm/x")
    (template,) = await room.parts.catalog.templates.list_all()
    await spoil(room, template.id, ("meta", "'{'"), "catalog_template")
    await room.restart()
    await room.manager.collect(grace_s=0.0)
    await room.manager.create(SMALL, name="m2")
    assert any("damaged row" in line for line in room.lines)
    await room.manager.collect(grace_s=0.0)
    await room.restart(killed=True)
    assert await room.sh("m1", "cat /dev/shm/x") == "x\n"
    await room.manager.suspend("m1")
    await room.manager.resume("m1")
    assert await room.sh(row.id, "cat /dev/shm/x") == "x\n"


@pytest.mark.parametrize("name", ["mch_gone", "tpl_half"])
async def test_a_folder_without_a_row_goes_at_the_next_start(room, name):
    folder = room.parts.machines_dir / name
    folder.mkdir(parents=True)
    (folder / "disk.kept").write_bytes(b"x")
    (room.parts.machines_dir / "notes").mkdir()
    await room.restart()
    assert [path.name for path in room.parts.machines_dir.iterdir()] == ["notes"]
