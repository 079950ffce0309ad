"""One key, one machine: also when the answer was lost, the server died midway, or the machine is gone by now. And the token
by which a machine proves which one it is."""

from dataclasses import replace

import pytest

from recess.catalog.once import KEEP_S, Once
from recess.errors import Conflict, KeyReused, NameInUse, NotFound, OutOfSpace, Refused
from recess.guestlink.link import TOKEN_PATH
from recess.machines.identity import machine_of, new_token
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL

KEY = Once("key", "asked")


async def made(room, once=KEY):
    row = await room.manager.acts.made(once)
    return row.id if row is not None else ""


async def test_a_key_is_known_after_a_restart_and_stands_for_one_request(room):
    assert await made(room) == ""
    row = await room.manager.create(SMALL, name="dev", once=KEY)
    await room.restart(killed=True)
    assert await made(room) == row.id
    with pytest.raises(KeyReused):
        await made(room, Once("key", "something else"))
    assert await room.manager.acts.made(None) is None


async def test_a_machine_that_is_gone_is_not_made_again(room):
    await room.manager.create(SMALL, name="dev", once=KEY)
    await room.manager.remove("dev", force=True)
    with pytest.raises(Conflict, match="removed since"):
        await made(room)


@pytest.mark.parametrize("point", ["machines.started", "machines.running"])
async def test_a_server_that_dies_while_it_makes_one_leaves_one_or_none(room, point):
    with crashing(point):
        await room.manager.create(SMALL, name="dev", once=KEY)
    await room.restart(killed=True)
    there = [one.id for one in await room.manager.list_machines(everything=True)]
    assert there == ([await made(room)] if point == "machines.running" else [])
    if not there:
        assert await made(room) == ""
        await room.manager.create(SMALL, name="dev", once=KEY)
    assert len(room.host.vms) == 1


async def test_what_failed_gives_its_key_back_and_leaves_nothing(room):
    await room.manager.create(SMALL, name="taken")
    with pytest.raises(NameInUse):
        await room.manager.create(SMALL, name="taken", once=KEY)
    with pytest.raises(NotFound):
        await room.manager.create(replace(SMALL, argv=("no-such-program",)), name="dev", once=KEY)
    assert await made(room) == ""
    assert [one.name for one in await room.manager.list_machines(everything=True)] == ["taken"]
    row = await room.manager.create(SMALL, name="dev", once=KEY)
    assert await made(room) == row.id


async def test_a_full_disk_leaves_no_orphan(room):
    room.fill_disk(True)
    with pytest.raises(OutOfSpace):
        await room.manager.create(SMALL, name="dev", once=KEY)
    assert await room.manager.list_machines(everything=True) == []
    room.fill_disk(False)
    assert (await room.manager.create(SMALL, name="dev", once=KEY)).id == await made(room)


@pytest.mark.parametrize("disk_only", [False, True])
async def test_restores_and_machines_that_are_not_started_have_keys_too(room, disk_only):
    first = await room.manager.acts.prepare(SMALL, name="dev", once=KEY)
    assert await made(room) == first.id
    await room.manager.acts.start("dev")
    await room.manager.snapshot("dev", name="frozen")
    other = Once("other", "asked")
    row, _ = await room.manager.restore("frozen", name="copy", disk_only=disk_only, once=other)
    await room.restart()
    assert await made(room, other) == row.id


async def test_two_at_once_make_one_and_very_old_keys_go(room):
    await room.manager.create(SMALL, name="one", once=KEY)
    with pytest.raises(KeyReused, match="at this moment"):
        await room.manager.create(SMALL, name="two", once=KEY)
    old = room.parts.clock.wall_s() - KEEP_S - 10
    await room.parts.catalog.db.write(lambda tx: tx.execute("UPDATE catalog_once SET created = ?", (old,)))
    await room.manager.create(SMALL, name="two", once=Once("two", "asked"))
    assert await made(room) == ""


async def token(room, ref):
    return await room.sh(ref, f"cat {TOKEN_PATH}")


async def test_each_life_of_each_machine_has_a_token_of_its_own(room):
    row = await room.manager.create(SMALL, name="dev")
    first = await token(room, "dev")
    assert (await room.manager.acts.whose(first)).id == row.id == machine_of(first)
    assert first not in str(row)
    await room.manager.pause("dev")
    assert (await room.manager.acts.whose(first)).id == row.id
    await room.manager.unpause("dev")
    await room.restart(killed=True)
    assert (await room.manager.acts.whose(first)).id == row.id
    (child,) = await room.manager.fork("dev", names=["child"])
    assert (await room.manager.acts.whose(await token(room, "child"))).id == child.id
    await room.manager.suspend("dev")
    with pytest.raises(Refused):
        await room.manager.acts.whose(first)
    await room.manager.resume("dev")
    second = await token(room, "dev")
    assert (await room.manager.acts.whose(second)).id == row.id
    await room.manager.snapshot("dev", name="frozen")
    copy, _ = await room.manager.restore("frozen", name="copy")
    assert (await room.manager.acts.whose(await token(room, "copy"))).id == copy.id
    for old in (first, "", "x", new_token(row.id), new_token("mch_nobody"), second[:-1], second + "0", f"{second}\n"):
        with pytest.raises(Refused):
            await room.manager.acts.whose(old)
