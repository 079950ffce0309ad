"""Lists, tree, diff and the check, over the fake driver and a real store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recess.drivers.fake.pages import POKE_FIRST
from recess.errors import BadInput, Corrupt, DriverFailed, Incompatible, NotFound
from recess.guestlink.link import ExecRequest
from recess.machines.retention import Holds
from recess.testing.machine_room import SMALL
from recess.units import MIB

BIG = replace(SMALL, memory_bytes=256 * MIB)


@pytest.fixture
async def dev(room):
    row = await room.manager.create(BIG, name="dev")
    for number in range(8):
        room.host.vms[row.id].poke(POKE_FIRST + number, b"stays %d" % number)
    return row


def node(tree, ref):
    return next(one for one in tree["nodes"] if one["id"] == ref)


async def test_the_tree_tells_parents_bytes_and_who_needs_what(room, dev):
    one = await room.manager.snapshot("dev", name="base:v1")
    await room.sh("dev", f"echo {'y' * 9000} > /root/big")
    two = await room.manager.snapshot("dev")
    child, _ = await room.manager.restore(one.id, name="child")
    three = await room.manager.suspend("child")

    async def held(_since):
        return Holds({two.id: "session s"}, {})

    room.manager.keeping.bind(held)
    tree = await room.manager.views.tree()
    assert node(tree, one.template)["kind"] == "template"
    assert node(tree, one.id)["parent"] == one.template
    assert node(tree, two.id)["parent"] == node(tree, three.id)["parent"] == one.id
    assert node(tree, one.id)["names"] == ["base:v1", "base"]
    assert set(node(tree, one.id)["dependents"]) == {two.id, three.id}
    assert node(tree, two.id)["needed_by"] == ["machine dev", "session s"]
    assert node(tree, three.id)["needed_by"] == ["machine child"]
    assert child.id == node(tree, three.id)["machine"]
    total = sum(info.size_bytes for info in room.blobs.list_blobs())
    assert tree["bytes"] == node(tree, one.template)["branch_frees"] == total
    promised = node(tree, two.id)["frees"]
    room.manager.keeping.bind(lambda _since: nothing())
    assert (await room.manager.keeping.remove(two.id)).bytes == promised > 0
    shown = await room.manager.views.inspect("base:v1")
    assert shown["restorable"]
    assert shown["dependents"] == [three.id]
    assert shown["owned"] + shown["shared"] == shown["stored"]


async def nothing():
    return Holds()


async def test_why_a_snapshot_cannot_be_restored_here(room, dev):
    one, two, three = [await room.manager.snapshot("dev") for _ in range(3)]
    room.driver.version = "2"
    room.blobs._blobs[f"manifests/{two.id}"] = (b"x", 0.0)
    await room.parts.catalog.db.write(
        lambda tx: tx.execute("UPDATE catalog_snapshot SET figures = '?' WHERE id = ?", (three.id,))
    )
    rows = {row["id"]: row for row in await room.manager.views.list_all()}
    assert rows[one.id]["reasons"] == ["version is '1' in the snapshot, '2' here"]
    assert "does not match its hash" in rows[two.id]["reasons"][0]
    assert rows[three.id]["damaged"]
    assert [row["restorable"] for row in rows.values()] == [False, False, False]
    with pytest.raises(Incompatible) as caught:
        await room.manager.restore(one.id, name="x")
    assert caught.value.details["reasons"] == rows[one.id]["reasons"]
    room.driver.version = "1"
    room.blobs._blobs.pop(f"manifests/{one.template}")
    assert "no such snapshot" in (await room.manager.views.inspect(one.id))["reasons"][0]
    tree = await room.manager.views.tree()
    assert [node(tree, ref)["damaged"] for ref in (one.id, two.id, three.id, one.template)] == [False, True, True, True]


async def test_diff_names_files_processes_and_memory_and_runs_nothing(room, dev):
    link = await room.manager.link("dev")
    await room.sh("dev", "echo a > /root/stays; echo b > /root/changes; echo c > /root/goes")
    await link.exec(ExecRequest(argv=["sleep", "1000"], job_id="stays"))
    await link.exec(ExecRequest(argv=["sleep", "2000"], job_id="goes"))
    one = await room.manager.snapshot("dev", name="dd:1")
    await room.sh("dev", "echo bb > /root/changes; rm /root/goes; echo n > /root/new; echo t > /tmp/ram")
    await (await link.attach("goes")).signal(9)
    await link.exec(ExecRequest(argv=["sleep", "3000"], job_id="new"))
    room.host.vms[dev.id].poke(POKE_FIRST, b"other")
    two = await room.manager.snapshot("dev", name="dd:2")
    before = set(room.host.vms)
    found = await room.manager.looks.diff("dd:1", "dd:2")
    assert set(room.host.vms) == before
    assert (found["left"], found["right"]) == (one.id, two.id)
    assert found["files"] == {
        "added": ["/root/new", "/tmp/ram"], "removed": ["/root/goes"], "changed": ["/root/changes"],
    }  # fmt: skip
    added, removed = found["processes"]["added"], found["processes"]["removed"]
    assert [p.partition(" ")[2] for p in added] == ["sleep 3000"]
    assert [p.partition(" ")[2] for p in removed] == ["sleep 2000"]
    assert found["memory"]["changed"] >= 1
    same = await room.manager.looks.diff("dd:1", "dd:1")
    assert (same["memory"]["changed"], same["disk"]["changed"]) == (0, 0)
    assert same["files"] == {"added": [], "removed": [], "changed": []}
    other = await room.manager.create(SMALL, name="small")
    with pytest.raises(BadInput, match="different memory"):
        await room.manager.looks.diff("dd:1", (await room.manager.snapshot(other.id)).id)
    with pytest.raises(NotFound):
        await room.manager.looks.diff("dd:1", "dd:3")
    assert not any(folder.name not in room.host.vms for folder in room.parts.machines_dir.iterdir())


async def test_the_check_restores_for_real_and_compares(room, dev):
    one = await room.manager.snapshot("dev")
    found = await room.manager.looks.check(one.id)
    assert found["pages"] >= 8
    assert found["equal"] + found["moved_on"] == found["pages"]
    row = await room.parts.catalog.snapshots.get(one.id)
    assert row.figures["checked"]["ok"]
    assert len(room.host.vms) == 1
    room.host.die_at = "restore"
    with pytest.raises(DriverFailed):
        await room.manager.looks.check(one.id)
    row = await room.parts.catalog.snapshots.get(one.id)
    assert not row.figures["checked"]["ok"]
    assert len(room.host.vms) == 1


async def test_a_machine_that_comes_back_as_something_else_is_found_out(room, dev, monkeypatch):
    vm = room.host.vms[dev.id]
    for number in range(4000):
        vm.poke(POKE_FIRST + number, b"%d" % number)
    one = await room.manager.snapshot("dev")
    real = room.driver.restore

    async def forgetful(*args):
        restored = await real(*args)
        restored.poked.clear()
        return restored

    room.driver.restore = forgetful
    with pytest.raises(Corrupt, match="not what was stored"):
        await room.manager.looks.check(one.id)
    room.driver.restore = real
    await room.manager.looks.check(one.id)


async def test_one_snapshot_a_day_is_checked_the_longest_unchecked_first(room, dev):
    rows = [await room.manager.snapshot("dev") for _ in range(3)]
    looks = room.manager.looks
    assert await looks.check_due() == rows[2].id  # the newest of those never checked
    assert await looks.check_due() == ""  # not again today
    object.__setattr__(room.parts, "keeping", replace(room.parts.keeping, check_every_s=1e-9))
    assert {await looks.check_due(), await looks.check_due()} == {rows[0].id, rows[1].id}
    room.blobs._blobs[f"vmstates/{room.parts.store.manifest(rows[2].id)['vmstate']['id']}"] = (b"x", 0.0)
    assert await looks.check_due() == rows[2].id
    checked = (await room.parts.catalog.snapshots.get(rows[2].id)).figures["checked"]
    assert not checked["ok"]
    object.__setattr__(room.parts, "keeping", replace(room.parts.keeping, check_every_s=0.0))
    assert await looks.check_due() == ""
