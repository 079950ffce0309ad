"""Stored snapshots after they were taken: removed, pruned, swept; what is needed stays, doubt keeps."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import replace

import pytest

from recess.drivers.fake.pages import POKE_FIRST
from recess.errors import BadInput, Corrupt, HasDependents, NotFound, OutOfSpace
from recess.machines.manager import Manager
from recess.machines.retention import Holds, Keeping
from recess.snapshots.recompression import Recompression
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL
from recess.units import MIB

HOUR = 3600.0


def blobs_of(room):
    return {info.key for info in room.blobs.list_blobs()}


BIG = replace(SMALL, memory_bytes=256 * MIB)  # pages that stay where they are lie above 128 MiB in a fake guest


async def snapshots(room, count, **more):
    """Take snapshots of the machine "dev", each with a change of its own and pages that did not change; return rows."""
    rows = []
    vm = room.host.vms[(await room.manager.get("dev")).id]
    for number in range(8):
        vm.poke(POKE_FIRST + number, b"stays %d" % number)
    for number in range(count):
        await room.sh("dev", f"echo {number}{'x' * 5000} > /root/f{number}")
        rows.append(await room.manager.snapshot("dev", **more))
    return rows


def policy(room, **changes):
    """Give the room another policy, without ending what runs."""
    object.__setattr__(room.parts, "keeping", replace(room.parts.keeping, **changes))


@pytest.fixture
async def dev(room):
    return await room.manager.create(BIG, name="dev")


async def test_removing_gives_the_bytes_back_at_once(room, dev):
    before = blobs_of(room)
    (only,) = await snapshots(room, 1)
    removed = await room.manager.keeping.remove(only.id)
    assert removed.bytes >= only.figures["new_bytes"] > 0
    assert blobs_of(room) == before
    assert (await room.manager.get("dev")).snapshot == ""
    with pytest.raises(NotFound):
        await room.manager.get_snapshot(only.id)
    (again,) = await snapshots(room, 1)  # its parent is gone: nothing is compared with it any more
    await room.manager.verify_snapshot(again.id)


async def test_children_that_share_are_named_and_force_leaves_them_whole(room, dev):
    one, two = await snapshots(room, 2)
    with pytest.raises(HasDependents, match="snapshot " + two.id[:16]) as caught:
        await room.manager.keeping.remove(one.id)
    assert "--force" in caught.value.hint
    await room.manager.keeping.remove(one.id, force=True)
    await room.manager.verify_snapshot(two.id)
    child, _ = await room.manager.restore(two.id, name="child")
    assert (await room.sh(child.id, "cat /root/f0")).startswith("0x")
    await room.manager.keeping.remove(two.id)


async def test_what_a_suspended_machine_needs_is_never_taken(room, dev):
    await snapshots(room, 1)
    put_away = await room.manager.suspend("dev")
    for force in (False, True):
        with pytest.raises(HasDependents, match="machine dev"):
            await room.manager.keeping.remove(put_away.id, force=force)
    assert (await room.manager.resume("dev")).snapshot == put_away.id


async def test_what_sessions_need_is_never_taken_and_what_their_logs_name_only_by_force(room, dev):
    one, two, three = await snapshots(room, 3)

    async def held(since):
        assert since < time.time()
        return Holds({three.id: "session s"}, {one.id: "session s at position 4 of its log"})

    room.manager.keeping.bind(held)
    for force in (False, True):
        with pytest.raises(HasDependents, match="session s"):
            await room.manager.keeping.remove(three.id, force=force)
    with pytest.raises(HasDependents, match="position 4"):
        await room.manager.keeping.remove(one.id)
    await room.manager.keeping.remove(one.id, force=True)
    await room.manager.keeping.remove(two.id, force=True)
    await room.manager.collect(grace_s=-HOUR)
    await room.manager.verify_snapshot(three.id)


async def test_a_machine_whose_newest_snapshot_goes_falls_back_to_the_one_before(room, dev):
    one, two = await snapshots(room, 2)
    await room.manager.keeping.remove(two.id)
    assert (await room.manager.get("dev")).snapshot == one.id
    await room.host.vms[dev.id].die("power cut")
    while (await room.manager.get("dev")).state == "running":
        await asyncio.sleep(0)
    assert (await room.manager.resume("dev")).snapshot == one.id


async def test_a_cancelled_freeze_leaves_nothing(room, dev):
    (one,) = await snapshots(room, 1)
    before = blobs_of(room)
    taken = await room.manager.snapshot("dev", why="idle", resume=False)
    await room.manager.unpause("dev")
    await room.manager.discard_snapshot("dev", taken.id)
    await room.manager.discard_snapshot("dev", taken.id)
    await room.manager.discard_snapshot("dev", "snp_" + "0" * 64)  # of nobody
    while blobs_of(room) != before:
        await asyncio.sleep(0)
    row = await room.manager.get("dev")
    assert (row.state, row.snapshot) == ("running", one.id)
    assert [s.id for s in await room.manager.list_snapshots()] == [one.id]
    other = await room.manager.create(SMALL, name="other")
    await room.manager.discard_snapshot(other.id, one.id)  # not its own
    assert [s.id for s in await room.manager.list_snapshots()] == [one.id]


async def test_a_snapshot_whose_caller_goes_away_leaves_nothing(room, dev):
    before = blobs_of(room)
    store, gate = room.parts.store, asyncio.Event()
    real, loop = store.write, asyncio.get_running_loop()

    def slow(*args, **kwargs):
        loop.call_soon_threadsafe(gate.set)
        return real(*args, **kwargs)

    store.write = slow
    taking = asyncio.create_task(room.manager.snapshot("dev"))
    await gate.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert blobs_of(room) == before
    assert await room.manager.list_snapshots() == []
    assert (await room.manager.get("dev")).state == "running"


async def test_a_row_that_cannot_be_written_takes_the_bytes_with_it(room, dev):
    before = blobs_of(room)
    (one,) = await snapshots(room, 1)
    with_one = blobs_of(room)
    real = room.parts.catalog.db.write

    async def full(fn, **more):
        raise OutOfSpace("the disk of the database is full")

    room.parts.catalog.db.write = full
    with pytest.raises(OutOfSpace):
        await room.manager.snapshot("dev")
    room.parts.catalog.db.write = real
    await snapshots(room, 1)
    assert len(await room.manager.list_snapshots()) == 2
    assert with_one > before
    assert one.id in {s.id for s in await room.manager.list_snapshots()}


async def test_pruning_keeps_the_newest_the_recent_the_named_and_the_asked_for(room, dev):
    policy(room, keep_last=1, retention_s=HOUR)
    asked = (await snapshots(room, 1))[0]
    named = (await snapshots(room, 1, why="idle", name="keep:me"))[0]
    old = await snapshots(room, 3, why="idle")
    keeping = room.manager.keeping
    assert await keeping.prune() == []  # all are recent
    assert [one.id for one in await keeping.prune(older_than_s=0.0, dry_run=True)] == [old[0].id, old[1].id]
    assert [one.id for one in await keeping.prune(older_than_s=0.0)] == [old[0].id, old[1].id]
    assert [one.id for one in await keeping.prune(older_than_s=0.0, everything=True)] == [asked.id]
    assert {s.id for s in await room.manager.list_snapshots()} == {named.id, old[2].id}
    await room.manager.remove("dev", force=True)
    assert [one.id for one in await keeping.prune(older_than_s=0.0)] == [old[2].id]  # its machine is gone
    await room.manager.verify_snapshot("keep:me")


async def test_a_time_to_live(room, dev):
    one, two = await snapshots(room, 2)
    keeping = room.manager.keeping
    await keeping.tag(one.id, "short:lived")
    await keeping.expire(one.id, 0.001)
    await keeping.expire(two.id, HOUR)
    with pytest.raises(BadInput):
        await keeping.expire(two.id, -1.0)
    await asyncio.sleep(0.002)
    assert [gone.names for gone in await keeping.prune()] == [("short:lived", "short")]
    await keeping.expire(two.id, 0.0)
    assert (await room.parts.catalog.snapshots.get(two.id)).expires == 0.0


async def test_keep_last_of_one_machine(room, dev):
    rows = await snapshots(room, 4)
    await room.manager.keeping.tag(rows[1].id, "named")
    gone = await room.manager.keeping.keep_newest(dev.id, 1)
    assert [one.id for one in gone] == [rows[0].id, rows[2].id]
    with pytest.raises(BadInput):
        await room.manager.keeping.keep_newest(dev.id, 0)


async def test_tags(room, dev):
    one, two = await snapshots(room, 2)
    keeping = room.manager.keeping
    row, before = await keeping.tag(one.id, "base:v1")
    assert (row.name, before) == ("base:v1", "")
    row, before = await keeping.tag(two.id, "base:v1")
    assert (row.id, before) == (two.id, one.id)
    await keeping.untag("base:v1")
    with pytest.raises(NotFound):
        await keeping.untag("base:v1")
    assert (await room.manager.get_snapshot("base")).id == one.id


async def test_a_damaged_row_or_manifest_keeps_everything(room, dev):
    one, two, three = await snapshots(room, 3)
    db = room.parts.catalog.db
    await db.write(lambda tx: tx.execute("UPDATE catalog_snapshot SET figures = '{' WHERE id = ?", (one.id,)))
    everything = blobs_of(room)
    await room.manager.collect(grace_s=-HOUR)
    assert blobs_of(room) == everything  # the row is unreadable, its id is not
    good = room.blobs.get(f"manifests/{two.id}", max_bytes=1 << 20)
    room.blobs._blobs[f"manifests/{two.id}"] = (good[:-1], 0.0)
    with pytest.raises(Corrupt) as caught:
        await room.manager.collect(grace_s=-HOUR)
    assert "rm ID --force" in caught.value.hint
    assert blobs_of(room) == everything
    with pytest.raises(Corrupt):
        await room.manager.keeping.remove(one.id)
    assert await room.manager.keeping.prune(older_than_s=0.0, everything=True, keep_last=2) == []
    for damaged in (two.id, one.id):
        await room.manager.keeping.remove(damaged, force=True)
    await room.manager.collect(grace_s=-HOUR)
    assert [s.id for s in await room.manager.list_snapshots()] == [three.id]
    await room.manager.verify_snapshot(three.id)


async def test_the_newest_of_machines_and_templates_are_roots_even_without_rows(room, dev):
    """Rows may be lost (an older database brought back): what is still named somewhere is kept if it is there."""
    (one,) = await snapshots(room, 1)
    await room.parts.catalog.db.write(lambda tx: tx.execute("DELETE FROM catalog_snapshot"))
    await room.manager.collect(grace_s=-HOUR)
    room.parts.store.verify(one.id)
    await room.manager.remove("dev", force=True)
    await room.manager.collect(grace_s=-HOUR)
    with pytest.raises(NotFound):
        room.parts.store.verify(one.id)
    assert len(room.parts.store.list_ids()) == 1  # the template


async def test_under_a_quota_the_oldest_automatic_ones_go_first_and_then_it_is_refused(room, dev):
    rows = await snapshots(room, 4, why="idle")
    used = room.parts.store.used_bytes()
    policy(room, keep_last=1, quota_bytes=used - 1)
    newest = await room.manager.snapshot("dev", why="idle")
    left = [s.id for s in await room.manager.list_snapshots()]
    assert rows[0].id not in left
    assert newest.id in left
    policy(room, quota_bytes=1)
    with pytest.raises(OutOfSpace, match="quota"):
        await room.manager.snapshot("dev")
    assert [s.id for s in await room.manager.list_snapshots()] == [newest.id]
    with pytest.raises(OutOfSpace):
        await room.manager.fork("dev")
    assert (await room.manager.get("dev")).state == "running"
    assert await room.sh("dev", "echo alive") == "alive\n"
    await room.manager.suspend("dev", why="stop")  # a server that stops keeps its machines all the same


async def test_the_reserve_of_the_disk(room, dev):
    policy(room, reserve_bytes=1000)
    object.__setattr__(room.parts, "free_bytes", lambda: 999)
    with pytest.raises(OutOfSpace, match="reserve"):
        await room.manager.snapshot("dev")
    object.__setattr__(room.parts, "free_bytes", lambda: 1000)
    await room.manager.snapshot("dev")


async def test_a_damaged_parent_costs_bytes_and_nothing_else(room, dev):
    (one,) = await snapshots(room, 1)
    layer = next(key for key in blobs_of(room) if key in {f"layers/{f['id']}" for f in layers(room, one)})
    room.blobs._blobs[layer] = (b"damaged", time.time())
    (two,) = await snapshots(room, 1)
    assert room.parts.store.manifest(two.id)["parent"] == ""


def layers(room, row):
    return room.parts.store.manifest(row.id)["layers"]


@pytest.mark.parametrize("point", ["keeping.row_deleted", "discard.between_deletions"])
async def test_a_server_that_dies_while_removing_leaves_garbage_at_worst(room, dev, point):
    one, two = await snapshots(room, 2)
    with crashing(point):
        await room.manager.keeping.remove(two.id)
    room.manager = Manager(room.parts)
    await room.manager.recover()
    assert [s.id for s in await room.manager.list_snapshots()] == [one.id]
    await room.manager.verify_snapshot(one.id)
    swept = await room.manager.collect(grace_s=-HOUR)
    assert swept["files"] > 0
    assert (await room.manager.collect(grace_s=-HOUR))["files"] == 0
    await room.manager.verify_snapshot(one.id)


async def test_tidying_prunes_and_sweeps(room, dev):
    policy(room, keep_last=1, retention_s=0.0)
    await snapshots(room, 3, why="idle")
    counts = await room.manager.keeping.tidy()
    assert counts["pruned"] == 2
    assert counts["bytes"] > 0
    assert room.manager.keeping.policy == replace(Keeping(), keep_last=1, retention_s=0.0)


async def test_tidying_recompresses_what_sleeps(room, dev):
    words = random.Random(0).choices([b"%x" % (number * 7919) for number in range(999)], k=500_000)
    text = b" ".join(words)  # what a high level makes smaller than the level of a snapshot does
    for number in range(256):
        room.host.vms[dev.id].poke(POKE_FIRST + 100 + number, text[number * 4096 :])
    (one,) = await snapshots(room, 1)
    policy(room, recompression=Recompression(after_s=0.0))
    assert (await room.manager.keeping.tidy())["recompressed"] == 0
    policy(room, recompression=Recompression(after_s=1e-6, level=15))
    assert (await room.manager.keeping.tidy())["recompressed"] > 0
    assert len(list(room.blobs.list_blobs("recoded/"))) > 0
    await room.manager.verify_snapshot(one.id)
    child, _ = await room.manager.restore(one.id, name="child")
    assert room.host.vms[child.id].poked == room.host.vms[dev.id].poked


async def test_a_server_that_ends_waits_for_the_layer_in_hand_and_not_for_the_round(room, dev):
    await snapshots(room, 1)
    policy(room, recompression=Recompression(after_s=1e-6))
    begun = asyncio.Event()
    loop, real = asyncio.get_running_loop(), room.store.recompress

    def slow(policy, *, stopped, **how):
        def asked():
            loop.call_soon_threadsafe(begun.set)
            while not stopped():
                threading.Event().wait(0.001)
            return True

        return real(policy, stopped=asked, **how)

    room.store.recompress = slow
    round_ = asyncio.create_task(room.manager.keeping.recompress())
    await begun.wait()
    round_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await round_
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recompress")]
    assert list(room.blobs.list_blobs("recoded/")) == []


async def test_a_capture_is_stored_over_what_it_counts_from_or_not_at_all(room, dev):
    """The snapshot that a tracked capture counts from is removed while the capture waits to be stored."""
    (one,) = await snapshots(room, 1)
    room.host.vms[dev.id].poke(POKE_FIRST + 9, b"new")
    real, removed = room.manager._taker.store, []

    async def slow(record, live, taken, **more):
        if not removed:
            removed.append(taken.capture.parent)
            await room.manager.keeping.remove(one.id, force=True)
        return await real(record, live, taken, **more)

    room.manager._taker.store = slow
    two = await room.manager.snapshot("dev")
    assert removed == [one.id if room.driver.capabilities.dirty_tracking else ""]
    await room.manager.verify_snapshot(two.id)
    child, _ = await room.manager.restore(two.id, name="child")
    assert room.host.vms[child.id].poked == room.host.vms[dev.id].poked
    assert (await room.sh("child", "cat /root/f0")).startswith("0x")
