"""Machines of several drivers on one node: each keeps its own, through forks, snapshots and new servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from recess.drivers.fake import FakeDriver
from recess.errors import Incompatible, MissingTool, Unsupported
from recess.machines.manager import Manager
from recess.testing.machine_room import SMALL, Room, machine_room

OTHER = replace(SMALL, driver="other")


@pytest.fixture
async def room(tmp_path) -> AsyncIterator[Room]:
    async with machine_room(tmp_path) as made:
        other = FakeDriver(name="other")
        yield with_drivers(made, other)
        await made.manager.close(detach=True)
        for vm in list(other.host.vms.values()):
            await vm.kill()


def with_drivers(room: Room, *others: FakeDriver) -> Room:
    room.parts = replace(room.parts, others={one.name: one for one in others}, driver_why="it is the first")
    room.manager = Manager(room.parts)
    return room


async def test_a_machine_runs_under_the_driver_it_asks_for(room):
    plain, asked = await room.manager.create(SMALL), await room.manager.create(OTHER)
    other = room.parts.others["other"]
    assert (plain.driver, asked.driver) == ("fake", "other")
    assert list(other.list_leftovers()) == [asked.id]
    assert plain.meta["driver_why"] == "the node's own; it is the first"
    assert asked.meta["driver_why"] == "it was asked for"
    with pytest.raises(Unsupported, match="no driver 'third'") as caught:
        await room.manager.create(replace(SMALL, driver="third"))
    assert "fake, other" in caught.value.hint


async def test_templates_of_two_drivers_are_two(room):
    plain, asked = await room.manager.create(SMALL), await room.manager.create(OTHER)
    assert plain.template != asked.template
    said = [room.store.manifest(one.template)["spec"]["driver_why"] for one in (plain, asked)]
    assert said == ["the node's own; it is the first", "it was asked for"]
    again = await room.manager.create(replace(SMALL, driver="fake"))
    assert again.template == plain.template


async def test_children_and_copies_stay_under_it(room):
    asked = await room.manager.create(OTHER)
    snapshot = await room.manager.snapshot(asked.id)
    (child,) = await room.manager.fork(asked.id)
    copy, _ = await room.manager.restore(snapshot.id)
    await room.manager.suspend(asked.id)
    await room.manager.resume(asked.id)
    rows = [await room.manager.get(ref) for ref in (asked.id, child.id, copy.id)]
    assert [row.driver for row in rows] == ["other"] * 3
    assert set(room.parts.others["other"].list_leftovers()) == {row.id for row in rows}
    manifest = room.store.manifest(snapshot.id)
    assert manifest["fingerprint"]["driver"] == "other"
    assert manifest["spec"]["driver_why"] == "it was asked for"
    shown = await room.manager.views.inspect(snapshot.id)
    assert (shown["driver"], shown["driver_why"]) == ("other", "it was asked for")
    room.blobs._blobs.pop(f"manifests/{snapshot.id}")
    shown = await room.manager.views.inspect(snapshot.id)
    assert (shown["driver"], shown["driver_why"], shown["restorable"]) == ("", "", False)


async def test_a_new_server_takes_each_over_from_its_own(room):
    plain, asked = await room.manager.create(SMALL), await room.manager.create(OTHER)
    for row in (plain, asked):
        await room.sh(row.id, "echo here > /dev/shm/who")
    counts = await room.restart()
    assert counts["adopted"] == 2
    for row in (plain, asked):
        assert await room.sh(row.id, "cat /dev/shm/who") == "here\n"
    other = room.parts.others["other"]
    await other.host.vms[asked.id].kill()
    assert set(room.parts.leftovers()) == {plain.id}


async def test_a_server_that_was_killed_leaves_no_stray_of_either(room):
    asked = await room.manager.create(OTHER)
    await room.parts.catalog.machines.delete(asked.id)
    counts = await room.restart(killed=True)
    assert counts["strays"] == 1
    assert not room.parts.leftovers()


async def test_without_its_driver_the_memory_is_lost_aloud_and_the_disk_boots(room):
    asked = await room.manager.create(OTHER)
    await room.sh(asked.id, "echo kept > /root/file; sync; echo gone > /dev/shm/word")
    snapshot = await room.manager.suspend(asked.id)
    await room.manager.close(detach=True)
    with_drivers(room)  # the node has lost it
    await room.manager.recover()
    with pytest.raises(Incompatible, match="no driver 'other'") as caught:
        await room.manager.resume(asked.id)
    assert caught.value.details["reasons"] == ["it was taken under the driver other: this node has no driver 'other'"]
    listed = {one["id"]: one for one in await room.manager.views.list_all()}
    assert not listed[snapshot.id]["restorable"]
    report = await room.manager.bring_back(asked.id)
    assert report.rung == 4
    assert "memory and processes are gone" in report.why
    assert "under the driver fake, since other is not on this node" in report.why
    assert (await room.manager.get(asked.id)).driver == "fake"
    assert await room.sh(asked.id, "cat /root/file; test -e /dev/shm/word || echo lost") == "kept\nlost\n"


class Uninstalled(FakeDriver):
    """A driver whose tools are not there."""

    async def probe(self, *, fresh=False):
        raise MissingTool("it is not installed")

    async def fingerprint(self, spec):
        raise MissingTool("it is not installed")


async def test_a_driver_without_its_tools_is_as_good_as_none(room):
    """Its machines' disks boot under one that works; with none that boots disks the ladder is at its end."""
    asked = await room.manager.create(OTHER)
    await room.sh(asked.id, "echo kept > /root/file; sync")
    await room.manager.suspend(asked.id)
    await room.manager.close(detach=True)
    with_drivers(room, Uninstalled(name="other"))
    await room.manager.recover()
    room.parts.driver.capabilities = replace(room.parts.driver.capabilities, own_disk=False)
    with pytest.raises(Incompatible, match="it is not installed"):
        await room.manager.bring_back(asked.id)
    room.parts.driver.capabilities = replace(room.parts.driver.capabilities, own_disk=True)
    report = await room.manager.bring_back(asked.id)
    assert report.rung == 4
    assert "under the driver fake, since other is not on this node" in report.why
    assert await room.sh(asked.id, "cat /root/file") == "kept\n"


class Removed(Uninstalled):
    """One whose tools were removed while a machine ran."""

    async def adopt(self, vm_id, directory):
        await self.host.vms[vm_id].kill()
        raise MissingTool("it is not installed")


async def test_a_machine_that_runs_when_its_driver_is_removed_keeps_no_server_from_starting(room):
    plain, asked = await room.manager.create(SMALL), await room.manager.create(OTHER)
    await room.sh(asked.id, "echo kept > /root/file; sync")
    host = room.parts.others["other"].host
    await room.manager.close(detach=True)
    with_drivers(room, Removed(name="other", host=host))
    counts = await room.manager.recover()
    assert (counts["adopted"], counts["lost"], counts["strays"]) == (1, 1, 0)
    assert await room.sh(plain.id, "echo on") == "on\n"
    assert "could not be taken over: it is not installed" in (await room.manager.get(asked.id)).status
    assert not host.vms


async def test_nor_does_a_stray_of_one(room):
    asked = await room.manager.create(OTHER)
    host = room.parts.others["other"].host
    await room.manager.close(detach=True)
    await room.parts.catalog.machines.delete(asked.id)
    with_drivers(room, Removed(name="other", host=host))
    assert (await room.manager.recover())["strays"] == 1
    assert not host.vms


async def test_a_driver_without_disks_leaves_none_to_boot(room):
    other = room.parts.others["other"]
    asked = await room.manager.create(OTHER)
    snapshot = await room.manager.suspend(asked.id)
    other.capabilities = replace(other.capabilities, own_disk=False)
    with pytest.raises(Unsupported, match="keeps files in memory"):
        await room.manager.restore(snapshot.id, disk_only=True)
