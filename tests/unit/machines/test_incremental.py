"""Snapshots that hold what changed since the last one: what they count from, and what happens when that is gone."""

from __future__ import annotations

from dataclasses import replace

from recess.drivers.fake.driver import FakeVm
from recess.drivers.fake.pages import POKE_FIRST
from recess.machines.contract import Capture
from recess.paging.firstpages import FIRST, decode_first
from recess.testing.machine_room import SMALL
from recess.units import MIB, PAGE_BYTES

ROOMY = replace(SMALL, memory_bytes=256 * MIB)  # room for poked pages


async def fill(room, name: str, count: int, byte: int) -> None:
    row = await room.manager.get(name)
    vm = room.host.vms[row.id]
    for number in range(count):
        vm.poke(POKE_FIRST + number, bytes([byte, number % 251]) * (PAGE_BYTES // 2))


def captured(row) -> int:
    return int(row.figures["pages_captured"]["memory"])


async def test_the_second_counts_from_the_first_and_is_whole_without_it(room):
    await room.manager.create(ROOMY, name="one")
    await fill(room, "one", 400, 1)
    first = await room.manager.snapshot("one", name="first")
    await fill(room, "one", 3, 2)
    second = await room.manager.snapshot("one", name="second")
    assert first.figures["counts_from"] == ""
    assert second.figures["counts_from"] == first.id
    assert captured(second) < 20 < 400 <= captured(first)
    assert second.figures["pages_shared"]["inherited"] >= 397
    row, _ = await room.manager.restore("second", name="other")
    assert room.host.vms[row.id].poked == room.host.vms[first.machine].poked
    third = await room.manager.snapshot("other")
    assert third.figures["counts_from"] == second.id
    assert captured(third) < 20
    room.store.verify(third.id)


async def write_file(room, ref: str, name: str, size: int) -> None:
    guest = room.host.vms[(await room.manager.get(ref)).id].guest
    guest.files.write(name, bytes([len(name)]) * size)


async def test_the_disk_counts_from_the_last_one_too(room):
    """Also over a restore and a fork, whose children have all of the disk; what was captured in vain is in the next."""
    await room.manager.create(ROOMY, name="one")
    await write_file(room, "one", "/root/big", 300 * PAGE_BYTES)
    first = await room.manager.snapshot("one")
    await write_file(room, "one", "/root/z", 10)
    second = await room.manager.snapshot("one")
    captured_blocks = [int(row.figures["pages_captured"]["disk0"]) for row in (first, second)]
    assert captured_blocks[1] < 10 < 300 <= captured_blocks[0]
    # Names of one length: the fake guest's disk is one blob, in which a longer one would move what follows.
    (child,) = await room.manager.fork("one", names=["two"])
    other, _ = await room.manager.restore(second.id, name="six")
    for ref in (child.id, other.id):
        files = room.host.vms[ref].guest.disk.files
        big = files["/root/big"]
        assert big == room.host.vms[first.machine].guest.disk.files["/root/big"]
        await write_file(room, ref, "/root/zz", 20)
        row = await room.manager.snapshot(ref)
        assert int(row.figures["pages_captured"]["disk0"]) < 10
        room.store.verify(row.id)
        again, _ = await room.manager.restore(row.id, name=f"{(await room.manager.get(ref)).name}-again")
        assert room.host.vms[again.id].guest.disk.files["/root/big"] == big
        assert "/root/zz" in room.host.vms[again.id].guest.disk.files


async def test_what_is_touched_first_travels_with_the_children(room):
    """Known of a snapshot's machines on this node, it is in the next snapshot's manifest, and in those after it."""
    known: dict[str, list[int]] = {}
    room.manager._taker._parts = replace(room.manager._taker._parts, first_pages=lambda ref: known.get(ref, []))
    await room.manager.create(ROOMY, name="one")
    first = await room.manager.snapshot("one")
    known[first.id] = [7, 3, 5]
    second = await room.manager.snapshot("one")
    third = await room.manager.snapshot("one")
    hints = [room.store.manifest(row.id)["spec"].get(FIRST) for row in (first, second, third)]
    assert hints[0] is None
    assert [decode_first(hint["memory"]) for hint in hints[1:]] == [[3, 5, 7], [3, 5, 7]]
    await room.manager.restore(third.id, name="other")


async def test_a_fork_stands_alone_and_its_children_count_from_it(room):
    await room.manager.create(ROOMY, name="one")
    await fill(room, "one", 100, 1)
    await room.manager.snapshot("one")
    (child,) = await room.manager.fork("one")
    row = await room.manager.snapshot(child.id)
    assert row.figures["counts_from"] == row.parent != ""
    assert captured(row) < 20


async def test_after_a_restart_it_goes_on(room):
    await room.manager.create(ROOMY, name="one")
    await fill(room, "one", 100, 1)
    first = await room.manager.snapshot("one")
    await room.restart(killed=True)
    second = await room.manager.snapshot("one")
    assert second.figures["counts_from"] == first.id


async def test_when_the_last_one_is_gone_the_next_stands_alone(room):
    await room.manager.create(ROOMY, name="one")
    await fill(room, "one", 100, 1)
    first = await room.manager.snapshot("one")
    room.blobs.delete(f"manifests/{first.id}")
    second = await room.manager.snapshot("one")
    assert second.figures["counts_from"] == ""
    assert captured(second) >= 100
    room.store.verify(second.id)


async def test_when_its_layer_is_gone_it_is_taken_again_whole(room, monkeypatch):
    """The manifest is there, so the capture counts from it; the write finds the hole, and nothing refers to it."""
    await room.manager.create(ROOMY, name="one")
    await fill(room, "one", 100, 1)
    await room.manager.snapshot("one")
    for layer in [info.key for info in room.blobs.list_blobs("layers")]:
        room.blobs.delete(layer)
    parents = []
    real = FakeVm.capture

    async def seen(self, **words) -> Capture:
        parents.append(words.get("parent"))
        return await real(self, **words)

    monkeypatch.setattr(FakeVm, "capture", seen)
    second = await room.manager.snapshot("one")
    assert [bool(parent) for parent in parents] == [True, False]
    assert second.figures["counts_from"] == ""
    row, _ = await room.manager.restore(second.id, name="other")
    assert len(room.host.vms[row.id].poked) == 100
