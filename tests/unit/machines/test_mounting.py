"""Volumes of machines, over the fake driver: laid in, exchanged at every turn of a machine's life, and what never happens."""

import os
from dataclasses import replace

import pytest

from recess.errors import BadInput, IllegalState, InvalidSpec, NotFound, Unsupported
from recess.machines.service import Mount
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL

AT = 1_700_000_000


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "host"
    root.mkdir()
    write(root / "f", "one", AT)
    return root


def write(path, text, at):
    path.write_text(text)
    os.utime(path, (at, at))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def with_volume(source, target="/data", **more):
    return replace(SMALL, volumes=(Mount(str(source), target, **more),))


async def test_it_is_there_before_the_command_and_comes_back_when_it_has_ended(room, folder):
    script = "cat /data/f > /data/g; rm /data/f; mkdir /data/d"
    await room.manager.create(replace(with_volume(folder), argv=("sh", "-c", script)), name="job")
    assert await room.manager.acts.wait("job") == 0
    assert names(folder) == ["d", "g"]
    assert (folder / "g").read_text() == "one"


async def test_of_a_machine_that_is_removed_when_it_ends_too(room, folder):
    spec = replace(with_volume(folder), argv=("sh", "-c", "echo two > /data/f"), remove_on_exit=True)
    row = await room.manager.create(spec, name="job")
    assert await room.manager.acts.wait(row.id) == 0
    assert (folder / "f").read_text() == "two\n"


async def test_suspend_brings_out_and_resume_brings_in(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "echo mine > /data/made")
    await room.manager.suspend("dev")
    assert (folder / "made").read_text() == "mine\n"
    write(folder / "f", "changed on the host", AT + 5)
    (folder / "made").unlink()
    await room.manager.resume("dev")
    assert await room.sh("dev", "cat /data/f") == "changed on the host"
    with pytest.raises(AssertionError):
        await room.sh("dev", "cat /data/made")


async def test_sync_tells_what_it_did(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "echo x > /data/x")
    write(folder / "y", "y", AT)
    (report,) = await room.manager.acts.sync("dev")
    assert (report.copied_in, report.copied_out, report.bytes_in, report.bytes_out) == (1, 1, 1, 2)
    (again,) = await room.manager.acts.sync("dev")
    assert again.moved == 0
    await room.manager.create(SMALL, name="plain")
    with pytest.raises(IllegalState, match="no volumes"):
        await room.manager.acts.sync("plain")
    await room.manager.pause("dev")
    with pytest.raises(IllegalState, match="paused"):
        await room.manager.acts.sync("dev")


async def test_both_changed_the_newest_stands_and_the_other_is_kept(room, folder):
    write(folder / "g", "one", AT)
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "echo guest > /data/f; echo guest > /data/g")
    write(folder / "f", "host, older", AT + 1)
    write(folder / "g", "host, newer", 4_000_000_000)
    (report,) = await room.manager.acts.sync("dev")
    winners = {one["path"]: (one["winner"], one["kept"]) for one in report.conflicts}
    assert {path: winner for path, (winner, _) in winners.items()} == {"f": "guest", "g": "host"}
    assert (folder / "f").read_text() == "guest\n"
    assert (folder / winners["f"][1]).read_text() == "host, older"
    assert (folder / "g").read_text() == await room.sh("dev", "cat /data/g") == "host, newer"
    assert (folder / winners["g"][1]).read_text() == "guest\n"
    assert winners["f"][1].startswith("f.conflict-host-")
    assert winners["g"][1].startswith("g.conflict-dev-")


async def refused(room, machine, script):
    """Run a script that must fail for want of a right to write."""
    with pytest.raises(AssertionError, match="Read-only"):
        await room.sh(machine, script)


async def test_readonly_is_so_inside_and_the_host_goes_on_writing(room, folder):
    row = await room.manager.create(with_volume(folder, readonly=True), name="dev")
    assert row.status == ""
    for script in ("echo mine > /data/f", "touch /data/new", "rm /data/f", "mkdir /data/d"):
        await refused(room, "dev", script)
    write(folder / "f", "two", AT + 1)
    write(folder / "more", "new", AT + 1)
    await room.manager.acts.sync("dev")
    assert await room.sh("dev", "cat /data/f /data/more") == "twonew"
    await refused(room, "dev", "rm /data/more")
    await room.manager.suspend("dev")
    (folder / "more").unlink()
    await room.manager.resume("dev")
    assert "not refused" not in (await room.manager.get("dev")).status
    assert names(folder) == ["f"]
    await refused(room, "dev", "touch /data/new")
    await room.manager.stop("dev")
    await room.manager.acts.start("dev")  # a boot: nothing was sealed any more
    await refused(room, "dev", "touch /data/new")
    (child,) = await room.manager.fork("dev", 1)
    await refused(room, child.id, "touch /data/new")  # held: not exchanged, and read-only all the same


async def test_one_readonly_file_is_replaced_and_stays_readonly(room, folder):
    await room.manager.create(with_volume(folder / "f", "/etc/app.conf", readonly=True), name="dev")
    await refused(room, "dev", "echo mine > /etc/app.conf")
    write(folder / "f", "two", AT + 1)
    await room.manager.acts.sync("dev")
    assert await room.sh("dev", "cat /etc/app.conf") == "two"
    await refused(room, "dev", "echo mine > /etc/app.conf")


async def test_where_nothing_can_be_sealed_it_says_so_and_nothing_goes_out(room, folder, monkeypatch):
    async def seal(*_):
        raise Unsupported("no mounts here")

    monkeypatch.setattr("recess.drivers.fake.link.FakeLink.seal", seal)
    row = await room.manager.create(with_volume(folder, readonly=True), name="dev")
    assert "/data: what is written there inside is not refused" in row.status
    await room.sh("dev", "echo mine > /data/f; echo mine > /data/own")
    await room.manager.acts.sync("dev")
    assert (folder / "f").read_text() == "one"
    write(folder / "f", "two", AT + 1)
    await room.manager.acts.sync("dev")
    assert await room.sh("dev", "cat /data/f /data/own") == "twomine\n"
    assert names(folder) == ["f"]


async def test_an_emptied_machine_empties_no_host(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "rm -rf /data")
    await room.manager.acts.sync("dev")
    assert (folder / "f").read_text() == await room.sh("dev", "cat /data/f") == "one"


async def test_a_machine_from_an_older_snapshot_takes_nothing_back(room, folder):
    """What the host got since that snapshot is no removal of the machine's, and its older version no change."""
    await room.manager.create(with_volume(folder), name="dev")
    await room.manager.acts.sync("dev")
    await room.manager.snapshot("dev", name="before")
    await room.sh("dev", "echo newer > /data/f; echo more > /data/g")
    await room.manager.acts.sync("dev")
    await room.manager.acts.rewind("dev", "before")
    assert (folder / "f").read_text() == await room.sh("dev", "cat /data/f") == "newer\n"
    assert (folder / "g").read_text() == await room.sh("dev", "cat /data/g") == "more\n"
    assert names(folder) == ["f", "g"]


async def test_a_stop_and_a_start_is_no_conflict_with_what_was_edited_in_between(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "echo kept > /data/g")
    await room.manager.stop("dev")
    assert (folder / "g").read_text() == "kept\n"
    write(folder / "f", "edited", AT + 9)
    await room.manager.acts.start("dev")
    assert await room.sh("dev", "cat /data/f /data/g") == "editedkept\n"
    assert names(folder) == ["f", "g"]


async def test_after_a_power_cut_nothing_is_removed_and_what_differs_is_kept_twice(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "echo torn > /data/f; rm -f /data/none")
    write(folder / "f", "host", AT + 1)
    await room.manager.kill("dev", why="power")
    await room.manager.acts.start("dev")
    assert (folder / "f").read_text() == "torn\n"
    assert [p.read_text() for p in folder.glob("f.conflict-host-*")] == ["host"]


async def test_a_forks_volumes_move_only_when_somebody_asks(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    (child,) = await room.manager.fork("dev", names=["child"])
    assert child.spec.volumes[0].held
    await room.sh("child", "echo child > /data/f; rm -f /data/x; echo own > /data/own")
    await room.manager.suspend("child")
    await room.manager.resume("child")
    await room.manager.stop("child")
    assert (names(folder), (folder / "f").read_text()) == (["f"], "one")
    await room.manager.acts.start("child")
    (report,) = await room.manager.acts.sync("child")
    assert (report.copied_out, report.conflicts) == (2, [])
    assert (folder / "f").read_text() == "child\n"
    await room.manager.snapshot("dev", name="frozen")
    row, _ = await room.manager.restore("frozen", name="copy")
    assert row.spec.volumes[0].held
    (report,) = await room.manager.acts.sync("copy")
    assert (report.copied_in, report.conflicts) == (2, [])


async def test_a_removal_by_force_brings_out_first_and_a_kill_does_not(room, folder):
    await room.manager.create(with_volume(folder), name="one")
    await room.sh("one", "echo saved > /data/saved")
    await room.manager.remove("one", force=True)
    assert (folder / "saved").read_text() == "saved\n"
    await room.manager.create(with_volume(folder), name="two")
    await room.sh("two", "echo lost > /data/lost")
    await room.manager.kill("two", why="enough")
    assert names(folder) == ["f", "saved"]


async def test_named_volumes_take_over_what_an_image_has_there_and_others_hide_it(room, folder):
    spec = replace(with_volume("cache", "/data"), argv=("sh", "-c", "echo x > /data/x"))
    await room.manager.create(spec, name="job")
    assert await room.manager.acts.wait("job") == 0
    cache = room.parts.volumes.path("cache")
    assert names(cache) == ["x"]
    await room.manager.create(with_volume("cache", "/etc"), name="dev")
    with pytest.raises(AssertionError):
        await room.sh("dev", "cat /etc/hostname")
    assert await room.sh("dev", "cat /etc/x") == "x\n"


async def test_two_machines_share_a_volume(room, folder):
    for name in ("one", "two"):
        await room.manager.create(with_volume(folder), name=name)
    await room.sh("one", "echo from-one > /data/a")
    await room.manager.acts.sync("one")
    await room.manager.acts.sync("two")
    assert await room.sh("two", "cat /data/a") == "from-one\n"


@pytest.mark.parametrize("point", ["volumes.copied", "volumes.noted"])
async def test_a_server_that_dies_in_an_exchange_loses_and_doubles_nothing(room, folder, point):
    await room.manager.create(with_volume(folder), name="dev")
    await room.sh("dev", "echo guest > /data/g; rm /data/f")
    write(folder / "h", "host", AT)
    with crashing(point):
        await room.manager.acts.sync("dev")
    await room.restart(killed=True)
    (report,) = await room.manager.acts.sync("dev")
    assert (report.moved, report.conflicts) == (0, [])
    assert names(folder) == ["g", "h"]
    assert await room.sh("dev", "cat /data/g /data/h") == "guest\nhost"


async def test_a_failure_while_a_machine_goes_or_comes_is_told_and_keeps_nobody(room, folder):
    await room.manager.create(with_volume(folder), name="dev")
    folder.rename(folder.with_name("elsewhere"))
    await room.manager.suspend("dev")
    report = await room.manager.resume("dev")
    assert report.rung == 2
    row = await room.manager.get("dev")
    assert (row.state, "no such folder" in row.status) == ("running", True)
    errors = [e.details["error"] for e in room.manager.events.after(0) if e.action == "sync" and e.details.get("error")]
    assert len(errors) == 2
    folder.with_name("elsewhere").rename(folder)
    (done,) = await room.manager.acts.sync("dev")
    assert done.error == ""


async def test_what_is_refused(room, folder, tmp_path):
    for bad in (
        with_volume(folder, "data"), with_volume(folder, "/"), with_volume(folder, "/tmp/x"),
        with_volume(folder, "/a/../b"), with_volume("/", "/host"), with_volume(folder, size_bytes=0),
        replace(SMALL, volumes=(Mount(str(folder), "/a"), Mount(str(folder), "/a/b"))),
    ):  # fmt: skip
        with pytest.raises(InvalidSpec):
            await room.manager.create(bad)
    with pytest.raises(NotFound):
        await room.manager.create(with_volume(tmp_path / "missing"))
    with pytest.raises(BadInput):
        await room.manager.create(with_volume("no such name"))
    write(folder / "large", "x" * 5000, AT)
    with pytest.raises(BadInput, match="more than"):
        await room.manager.create(with_volume(folder, size_bytes=4096))
    assert await room.manager.list_machines(everything=True) == []


async def test_a_guest_that_is_stuck_keeps_nobody(room, folder, monkeypatch):
    monkeypatch.setattr("recess.machines.mounting.ANSWER_S", 0.01)
    row = await room.manager.create(with_volume(folder), name="dev")
    room.manager.fleet.need(row.id).link.mute = True
    await room.manager.remove("dev", force=True)
    assert names(folder) == ["f"]
