"""The manager over the fake driver: create, exec, snapshot, restore, fork, states, ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from recess.errors import (
    BadInput,
    GuestFailed,
    IllegalState,
    InvalidSpec,
    NameInUse,
    NotFound,
    OutOfSpace,
    Unsupported,
)
from recess.guestlink.link import ExecRequest
from recess.testing.machine_room import SMALL


async def test_create_gives_a_thawed_machine_with_its_own_identity(room):
    row = await room.manager.create(SMALL, name="dev-box")
    assert (row.state, row.name, row.driver) == ("running", "dev-box", "fake")
    assert await room.sh("dev-box", "hostname; cat /etc/machine-id") != ""
    info = await (await room.manager.link(row.id)).info()
    assert info["hostname"] == "dev-box"
    assert not info["frozen"]
    assert [r.id for r in await room.manager.list_machines()] == [row.id]
    assert (await room.manager.stats(row.id))["private_bytes"] > 0
    assert any("booting" in line for line in room.lines)


async def test_the_template_is_made_once_and_shared_by_equal_machines(room):
    first, second = await asyncio.gather(room.manager.create(SMALL), room.manager.create(SMALL))
    assert first.template == second.template
    assert sum("booting" in line for line in room.lines) == 1
    other = await room.manager.create(replace(SMALL, memory_bytes=128 << 20))
    assert other.template != first.template


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory_bytes": 1}, InvalidSpec),
        ({"cpus": 0}, InvalidSpec),
        ({"network": "wifi"}, InvalidSpec),
        ({"network": "full"}, Unsupported),
        ({"image": "missing"}, NotFound),
        ({"ports": (("127.0.0.1", 0, 0),)}, InvalidSpec),
        ({"env": {"A=B": "c"}}, InvalidSpec),
        ({"cwd": "here"}, InvalidSpec),
        ({"argv": ("no\0pe",)}, InvalidSpec),
        ({"argv": ("nosuch",)}, NotFound),
        ({"allow": ("not a host!",)}, BadInput),
    ],
)
async def test_bad_specs_leave_nothing(room, change, error):
    with pytest.raises(error):
        await room.manager.create(replace(SMALL, **change), name="gone")
    assert await room.manager.list_machines(everything=True) == []
    assert room.driver.list_leftovers() == []
    assert not list(room.parts.machines_dir.glob("mch_*"))


async def test_names(room):
    await room.manager.create(SMALL, name="one")
    with pytest.raises(NameInUse):
        await room.manager.create(SMALL, name="one")
    with pytest.raises(NotFound):
        await room.manager.get("two")
    with pytest.raises(BadInput):
        await room.manager.create(SMALL, name="-bad name")


async def test_snapshot_restore_keeps_memory_disk_and_processes(room):
    parent = await room.manager.create(SMALL, name="parent")
    await room.sh("parent", "echo nonce > /dev/shm/nonce; echo disk > /root/file")
    link = await room.manager.link(parent.id)
    await link.exec(ExecRequest(argv=["sleep", "1000"], job_id="sleeper"))
    snap = await room.manager.snapshot("parent", name="base:v1")
    assert snap.figures["forkable"]
    assert snap.figures["new_bytes"] > 0
    assert snap.figures["durable_s"] >= snap.figures["freezer_s"] > 0
    assert (await room.manager.get("parent")).snapshot == snap.id
    await room.sh("parent", "echo later > /root/file")

    child, report = await room.manager.restore("base:v1", name="child")
    assert (report.rung, report.snapshot) == (2, snap.id)
    assert await room.sh("child", "cat /dev/shm/nonce /root/file") == "nonce\ndisk\n"
    jobs = await (await room.manager.link(child.id)).jobs()
    assert [j.job_id for j in jobs if j.exit_code is None] == ["sleeper"]
    assert await room.sh("parent", "cat /root/file") == "later\n"
    again = await room.manager.snapshot("parent", name="base:v1")
    assert (await room.manager.get_snapshot("base:v1")).id == again.id  # a name moves
    assert (await room.manager.get_snapshot(snap.id)).name == ""  # an id does not
    assert (await room.manager.verify_snapshot("base:v1"))["template"]


async def test_forks_differ_in_everything_that_must_differ(room):
    parent = await room.manager.create(SMALL, name="parent")
    await room.sh("parent", "echo shared > /dev/shm/nonce")
    children = await room.manager.fork("parent", 3, names=["c1", "c2", "c3"])
    assert [c.name for c in children] == ["c1", "c2", "c3"]
    seen = set()
    for ref in ("parent", "c1", "c2", "c3"):
        assert await room.sh(ref, "cat /dev/shm/nonce") == "shared\n"
        seen.add(await room.sh(ref, "head -c 16 /dev/urandom | base64"))
        seen.add(await room.sh(ref, "hostname"))
        seen.add(await room.sh(ref, "cat /etc/machine-id"))
        seen.add(await room.sh(ref, "cat /run/recess/generation"))
    assert len(seen) == 16
    fork = next(s for s in await room.manager.list_snapshots() if s.why == "fork")
    assert children[0].meta["origin"] == {"snapshot": fork.id, "machine": parent.id}
    await room.sh("c1", "echo mine > /root/only")
    assert await room.sh("c2", "ls /root") == ""
    again = await room.manager.snapshot("c1")
    assert again.parent == fork.id


async def test_fork_is_all_or_nothing(room):
    await room.manager.create(SMALL, name="parent")
    await room.manager.create(SMALL, name="taken")
    with pytest.raises(NameInUse):
        await room.manager.fork("parent", 2, names=["fresh", "taken"])
    assert {r.name for r in await room.manager.list_machines(everything=True)} == {"parent", "taken"}
    with pytest.raises(BadInput):
        await room.manager.fork("parent", 0)
    with pytest.raises(BadInput):
        await room.manager.fork("parent", 2, names=["one"])
    await room.sh("parent", "echo fresh > /root/f")
    room.fill_disk(True)
    with pytest.raises(OutOfSpace):
        await room.manager.fork("parent", 2)
    assert {r.name for r in await room.manager.list_machines(everything=True)} == {"parent", "taken"}
    assert len(room.host.vms) == 2


async def test_suspend_gives_the_memory_back_and_resume_brings_the_same_machine(room):
    row = await room.manager.create(SMALL, name="lunch")
    await room.sh("lunch", "echo nonce > /dev/shm/nonce")
    boot = (await (await room.manager.link(row.id)).info())["boot_id"]
    snap = await room.manager.suspend("lunch", why="idle")
    assert room.driver.list_leftovers() == []
    assert (await room.manager.get("lunch")).state == "suspended"
    with pytest.raises(IllegalState, match="suspended"):
        await room.manager.link(row.id)
    report = await room.manager.resume("lunch")
    assert (report.rung, report.snapshot) == (2, snap.id)
    assert await room.sh("lunch", "cat /dev/shm/nonce") == "nonce\n"
    assert (await (await room.manager.link(row.id)).info())["boot_id"] == boot
    assert (await room.manager.get("lunch")).id == row.id
    with pytest.raises(IllegalState):
        await room.manager.resume("lunch")


async def test_pause_is_rung_one_and_wakes_with_the_right_clock(room):
    row = await room.manager.create(SMALL, name="parked")
    await room.manager.pause("parked")
    with pytest.raises(IllegalState):
        await room.manager.link(row.id)
    with pytest.raises(IllegalState):
        await room.manager.pause("parked")
    await asyncio.sleep(0.15)
    assert (await room.manager.resume("parked")).rung == 1
    guest = float(await room.sh("parked", "date"))
    assert abs(guest - room.parts.clock.wall_s()) < 0.05


async def test_snapshot_of_a_parked_machine_then_evict(room):
    row = await room.manager.create(SMALL, name="parked")
    await room.sh("parked", "echo x > /dev/shm/x")
    await room.manager.pause("parked")
    snap = await room.manager.snapshot("parked", resume=False, why="idle", log_position=7, epoch=3)
    assert (snap.log_position, snap.epoch, snap.figures["forkable"]) == (7, 3, True)
    assert (await room.manager.get("parked")).state == "paused"
    other = await room.manager.create(SMALL)
    foreign = await room.manager.snapshot(other.id)
    with pytest.raises(IllegalState, match="not one of"):
        await room.manager.evict("parked", snapshot=foreign.id)
    await room.manager.evict("parked", snapshot=snap.id)
    assert row.id not in room.driver.list_leftovers()
    await room.manager.resume("parked")
    assert await room.sh("parked", "cat /dev/shm/x") == "x\n"


async def test_a_full_disk_leaves_the_machine_up_and_the_older_snapshot_valid(room):
    await room.manager.create(SMALL, name="busy")
    await room.sh("busy", "echo one > /root/f")
    first = await room.manager.snapshot("busy")
    await room.sh("busy", "echo two > /root/f")
    for attempt in (lambda: room.manager.snapshot("busy"), lambda: room.manager.suspend("busy")):
        room.fill_disk(True)
        with pytest.raises(OutOfSpace):
            await attempt()
        room.fill_disk(False)
        row = await room.manager.get("busy")
        assert (row.state, row.snapshot) == ("running", first.id)
        assert await room.sh("busy", "cat /root/f") == "two\n"
    await room.manager.restore(first.id, name="older")
    assert await room.sh("older", "cat /root/f") == "one\n"


async def test_a_silent_guest_is_captured_but_cannot_be_forked(room):
    row = await room.manager.create(SMALL, name="mute")
    await room.sh("mute", "echo x > /dev/shm/x")
    room.host.vms[row.id].link.mute = True
    snap = await room.manager.snapshot("mute")
    assert snap.figures["forkable"] is False
    with pytest.raises(Unsupported):
        await room.manager.fork("mute", 1)
    with pytest.raises(Unsupported):
        await room.manager.restore(snap.id, name="clone")
    await room.manager.kill("mute", why="silent")
    again, _ = await room.manager.restore(snap.id, machine_id=row.id)
    assert again.id == row.id
    assert await room.sh("mute", "cat /dev/shm/x") == "x\n"


async def test_a_machine_is_not_served_unless_it_was_thawed(room, monkeypatch):
    await room.manager.create(SMALL, name="parent")
    from recess.drivers.fake.link import FakeLink

    async def refuse(self, thaw, timeout_s=10.0):
        raise GuestFailed("thaw: no entropy device")

    monkeypatch.setattr(FakeLink, "thaw", refuse)
    with pytest.raises(GuestFailed, match="no entropy") as caught:
        await room.manager.fork("parent", 1)
    assert "console" in caught.value.details
    assert len(room.host.vms) == 1
    assert len(await room.manager.list_machines(everything=True)) == 1


async def test_main_process_runs_is_logged_and_its_end_is_the_machines_end(room):
    room.manager.fleet.linger_s = 0.02
    spec = replace(SMALL, argv=("sh", "-c", "echo out; echo err 2>&1; exit 3"))
    row = await room.manager.create(spec, name="job")
    assert await room.manager.job("job") == "main"
    await room.manager.wait_dead(row.id)
    done = await room.manager.get("job")
    assert (done.state, done.exit_code) == ("exited", 3)
    assert (await room.manager.output("job")).data == b"out\nerr\n"
    await room.manager.remove("job")
    with pytest.raises(NotFound):
        await room.manager.get("job")
    assert not list(room.parts.machines_dir.glob("mch_*"))


async def test_a_client_that_attaches_right_after_the_end_still_gets_everything(room):
    row = await room.manager.create(replace(SMALL, argv=("echo", "hi")), name="quick")
    for _ in range(50):
        await asyncio.sleep(0)
    job = await (await room.manager.link(row.id)).attach("main")
    assert [data async for _, data in job.output()] == [b"hi\n"]
    assert await job.wait() == 0


async def test_remove_on_exit(room):
    room.manager.fleet.linger_s = 0.01
    row = await room.manager.create(replace(SMALL, argv=("true",), remove_on_exit=True))
    await room.manager.wait_dead(row.id)
    while await room.manager.list_machines(everything=True):
        await asyncio.sleep(0)
    assert room.host.vms == {}


async def test_stop_sends_sigterm_first(room):
    await room.manager.create(replace(SMALL, argv=("sleep", "1000")), name="server")
    await room.manager.stop("server")
    row = await room.manager.get("server")
    assert (row.state, row.exit_code) == ("exited", 143)
    assert room.host.vms == {}
    await room.manager.stop("server")
    await room.manager.create(SMALL, name="plain")
    await room.manager.stop("plain")
    assert (await room.manager.get("plain")).exit_code == 0


async def test_kill_remove_and_their_guards(room):
    row = await room.manager.create(SMALL, name="m1")
    with pytest.raises(IllegalState, match="running"):
        await room.manager.remove("m1")
    await room.manager.kill("m1", why="because")
    await room.manager.kill("m1", why="again")
    dead = await room.manager.get("m1")
    assert (dead.state, dead.status) == ("dead", "because")
    assert await room.manager.wait_dead(row.id) == "because"
    await room.manager.create(SMALL, name="m1")
    await room.manager.remove("m1", force=True)
    assert room.host.vms == {}


async def test_a_vm_that_dies_is_noticed_and_falls(room):
    lost = await room.manager.create(SMALL, name="lost")
    saved = await room.manager.create(SMALL, name="saved")
    snap = await room.manager.snapshot("saved")
    waiter = asyncio.create_task(room.manager.wait_dead(lost.id))
    await asyncio.sleep(0)
    await room.host.vms[lost.id].die("segmentation fault")
    assert await waiter == "segmentation fault"
    assert (await room.manager.get("lost")).state == "dead"
    await room.host.vms[saved.id].die("out of memory")
    await asyncio.sleep(0)
    while (row := await room.manager.get("saved")).state == "running":
        await asyncio.sleep(0)
    assert row.state == "suspended"
    report = await room.manager.resume("saved")
    assert "out of memory" in report.why
    assert report.snapshot == snap.id


async def test_a_vm_whose_end_cannot_be_written_down_ends_all_the_same(room, caplog):
    row = await room.manager.create(SMALL, name="lost")
    live = room.manager.fleet.need(row.id)
    await room.parts.catalog.machines.db.close()
    await room.host.vms[row.id].die("segmentation fault")
    await asyncio.wait_for(live.gone.wait(), 5)
    assert await live.watcher is None  # nothing that nobody looks at
    assert "segmentation fault" in caplog.text
    assert "the database is closed" in caplog.text


async def test_deadline(room):
    row = await room.manager.create(SMALL, name="leased")
    await room.manager.set_deadline(row.id, 0.02)
    assert await room.manager.wait_dead(row.id) == "deadline passed"


async def test_snapshots_are_listed_found_and_guarded(room):
    await room.manager.create(SMALL, name="m1")
    named = await room.manager.snapshot("m1", name="keep")
    assert (await room.manager.get_snapshot("keep")).id == named.id
    assert (await room.manager.get_snapshot(named.id[:20])).id == named.id
    assert [s.id for s in await room.manager.list_snapshots()] == [named.id]
    await room.manager.suspend("m1")
    newest = (await room.manager.get("m1")).snapshot
    from recess.errors import HasDependents

    with pytest.raises(HasDependents, match="m1"):
        await room.manager.remove_snapshot(newest)
    await room.manager.remove("m1")
    await room.manager.remove_snapshot(newest)
    with pytest.raises(NotFound):
        await room.manager.get_snapshot(newest)
    await room.manager.collect(grace_s=0.0)


async def test_incoming_streams_find_their_handler_even_if_it_comes_later(room):
    row = await room.manager.create(SMALL, name="caller")
    stream = await room.host.vms[row.id].guest.open_out("session", {"peer": 1})
    await stream.write(b"hello")
    heard = asyncio.get_running_loop().create_future()

    async def handler(service, metadata, other):
        heard.set_result((service, metadata["peer"], await other.read()))
        await other.close()

    room.manager.set_incoming(row.id, "session", handler)
    assert await heard == ("session", 1, b"hello")
    await room.manager.suspend("caller")
    await room.manager.resume("caller")
    heard = asyncio.get_running_loop().create_future()
    again = await room.host.vms[row.id].guest.open_out("session", {"peer": 2})
    await again.write(b"back")
    assert await heard == ("session", 2, b"back")


async def test_ports_are_published_and_move_for_forks(room):
    spec = replace(SMALL, argv=("httpd", "8000"), cwd="/srv", ports=(("127.0.0.1", 0, 8000),))
    row = await room.manager.create(spec, name="web")
    link = await room.manager.link(row.id)
    await link.write_file("/srv/index.html", b"<h1>up</h1>")

    async def get(machine):
        ip, port, _ = machine.meta["ports"][0]
        reader, writer = await asyncio.open_connection(ip, port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        page = await reader.read()
        writer.close()
        await writer.wait_closed()
        return page

    assert (await get(row)).endswith(b"<h1>up</h1>")
    (child,) = await room.manager.fork("web")
    assert child.meta["ports"][0][1] != row.meta["ports"][0][1]
    assert (await get(child)).endswith(b"<h1>up</h1>")
    await room.manager.suspend("web")
    await room.manager.resume("web")
    assert (await get(await room.manager.get("web"))).endswith(b"<h1>up</h1>")
    taken = child.meta["ports"][0][1]
    from recess.errors import Conflict

    with pytest.raises(Conflict, match="in use"):
        await room.manager.create(replace(spec, ports=(("127.0.0.1", taken, 8000),)))


async def test_an_end_whose_watcher_was_cancelled_returns_all_the_same(room):
    row = await room.manager.create(SMALL)
    live = room.manager.fleet.need(row.id)
    live.watcher.cancel()  # as a runtime that ends does with every task
    async with asyncio.timeout(10):
        await room.manager.fleet.end(row.id, "test")
    assert not live.gone.is_set()
    live.gone.set()
    room.manager.fleet._live.pop(row.id)
