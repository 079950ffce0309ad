"""Folders as machines: states, snapshots, what a crash leaves; and the files half of the link."""

import asyncio
import io
import json
import tarfile

import pytest

from recess.clock import SystemClock
from recess.errors import BadInput, IllegalState, Incompatible, NotFound, Unavailable, Unsupported
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.plain import PlainMachines
from recess.plain.machines import KEEP, copy_tree

SPEC = MachineSpec(labels={"backend": "process"}, ports=(("127.0.0.1", 0, 80),))


@pytest.fixture
async def open_machines(tmp_path):
    opened = []

    def make():
        opened.append(PlainMachines(tmp_path / "plain", tmp_path / "s", SystemClock()))
        return opened[-1]

    yield make
    for one in opened:
        await one.close()
    last = PlainMachines(tmp_path / "plain", tmp_path / "s", SystemClock())
    for row in await last.list_machines(everything=True):
        await last.remove(row.id, force=True)


async def start(machines, row, *argv, job="j1"):
    return await (await machines.link(row.id)).exec(ExecRequest(argv=argv, cwd="/root", job_id=job))


async def test_its_life(open_machines):
    machines = open_machines()
    row = await machines.create(SPEC, session="ses_1")
    link = await machines.link(row.id)
    await link.write_file("/root/a", b"1")
    job = await start(machines, row, "sleep", "1000")
    await machines.pause(row.id)
    with pytest.raises(IllegalState, match="paused"):
        await machines.link(row.id)
    assert (await machines.resume(row.id)).rung == 1
    stored = await machines.suspend(row.id)
    assert (await machines.get(row.id)).state == "suspended"
    assert await job.wait() == 137  # put away it has no process
    with pytest.raises(Incompatible, match="keeps no memory"):
        await machines.resume(row.id)
    report = await machines.bring_back(row.id, snapshots=[stored.id])
    assert (report.rung, report.snapshot) == (4, stored.id)
    assert await (await machines.link(row.id)).read_file("/root/a") == b"1"
    await machines.kill(row.id, why="over")
    await machines.kill(row.id, why="over")
    assert await machines.wait_dead(row.id) == "over"
    with pytest.raises(Unsupported):
        await machines.fork(row.id)


async def test_a_snapshot_is_a_copy(open_machines):
    machines = open_machines()
    row = await machines.create(SPEC)
    link = await machines.link(row.id)
    await link.write_file("/root/a", b"1")
    stored = await machines.snapshot(row.id, log_position=7)
    await link.write_file("/root/a", b"2")
    with pytest.raises(Incompatible):
        await machines.restore(stored.id)
    copy, report = await machines.restore(stored.id, disk_only=True)
    assert (report.rung, report.log_position) == (4, 7)
    assert await (await machines.link(copy.id)).read_file("/root/a") == b"1"
    await machines.kill(row.id, why="x")
    assert (await machines.bring_back(row.id, snapshots=[stored.id])).snapshot == ""  # its own folder is the newest
    assert await (await machines.link(row.id)).read_file("/root/a") == b"2"
    await machines.kill(row.id, why="x")
    await machines.bring_back(row.id, snapshots=[stored.id], own_disk=False)
    assert await (await machines.link(row.id)).read_file("/root/a") == b"1"
    await machines.discard_snapshot(row.id, stored.id)
    await machines.discard_snapshot(row.id, stored.id)
    assert await machines.stored_snapshots({stored.id}) == set()


async def test_old_snapshots_go(open_machines):
    machines = open_machines()
    row = await machines.create(SPEC)
    made = [(await machines.snapshot(row.id)).id for _ in range(KEEP + 2)]
    assert await machines.stored_snapshots(set(made)) == set(made[2:])


async def test_the_next_server_finds_everything(open_machines, tmp_path):
    machines = open_machines()
    row = await machines.create(SPEC, session="ses_1")
    stored = await machines.snapshot(row.id)
    job = await start(machines, row, "sleep", "1000")
    await machines.close()
    (tmp_path / "plain" / "mch_half").mkdir()  # being made when its server died
    (tmp_path / "plain" / "snapshots" / "snp_half" / "root").mkdir(parents=True)
    later = open_machines()
    found = await later.get(row.id)
    assert (found.state, found.spec, found.snapshot) == ("running", SPEC, stored.id)
    assert (await (await later.link(row.id)).attach("j1")).pid == job.pid
    assert await later.stored_snapshots({stored.id}) == {stored.id}
    assert not (tmp_path / "plain" / "mch_half").exists()
    assert not (tmp_path / "plain" / "snapshots" / "snp_half").exists()


async def test_a_server_that_died_while_it_put_files_back(open_machines, tmp_path):
    machines = open_machines()
    first, second = await machines.create(SPEC), await machines.create(SPEC)
    for row, moved in ((first, True), (second, False)):
        folder = tmp_path / "plain" / row.id
        (folder / "root" / "a").write_text("old")
        (folder / "root.new").mkdir()
        (folder / "root.new" / "a").write_text("new")
        if moved:
            (folder / "root").rename(folder / "root.old")
    later = open_machines()
    assert await (await later.link(first.id)).read_file("/a") == b"new"
    assert await (await later.link(second.id)).read_file("/a") == b"old"  # the copy may not have been whole
    for row in (first, second):
        assert not [one for one in (tmp_path / "plain" / row.id).iterdir() if one.name.startswith("root.")]


async def test_after_a_restart_of_the_host_nothing_runs(open_machines, tmp_path):
    machines = open_machines()
    row = await machines.create(SPEC)
    path = tmp_path / "plain" / row.id / "row.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "meta": {"boot": "another"}}))
    found = await open_machines().get(row.id)
    assert (found.state, found.status) == ("dead", "the host was restarted")


async def test_a_copy_that_fails_leaves_the_machine_running(open_machines, tmp_path):
    machines = open_machines()
    row = await machines.create(SPEC)
    job = await start(machines, row, "sh", "-c", "sleep 0; exec sleep 1000")
    (tmp_path / "plain" / "snapshots").rmdir()
    (tmp_path / "plain" / "snapshots").write_text("in the way")
    with pytest.raises(Unavailable):
        await machines.snapshot(row.id)
    (tmp_path / "plain" / "snapshots").unlink()
    await job.signal(15)
    assert await job.wait() == 143  # one that was stopped would not have ended


async def test_copying_nothing_is_told(tmp_path):
    with pytest.raises(Unavailable, match="cannot copy"):
        await copy_tree(tmp_path / "nothing", tmp_path / "there")


async def test_files(open_machines):
    machines = open_machines()
    link = await machines.link((await machines.create(SPEC)).id)
    await link.write_file("/a/b", b"1", 0o600)
    assert (await link.stat("/a/b")).mode == 0o600
    assert [one.path for one in await link.list_dir("/a")] == ["/a/b"]
    assert await link.read_file("../../a/b") == b"1"  # `..` ends at the root, as in a machine
    for wrong in (link.read_file("/none"), link.stat("/none"), link.list_dir("/none")):
        with pytest.raises(NotFound):
            await wrong
    for wrong in (link.list_dir("/a/b"), link.read_file("/a/b", 0), link.remove("/a"), link.write_file("/a", b"")):
        with pytest.raises(BadInput):
            await wrong
    await link.remove("/a", recursive=True)
    await link.remove("/a")
    with pytest.raises(BadInput, match="leaves the folder"):
        await link.put_tar("/t", archive("../out"))
    await link.put_tar("/t", archive("in/side"))
    assert await link.read_file("/t/in/side") == b"x"


async def archive(name):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    yield out.getvalue()


async def test_doors_are_opened_once_somebody_listens(open_machines, tmp_path):
    machines = open_machines()
    row = await machines.create(SPEC)
    heard = asyncio.get_running_loop().create_future()

    async def handler(service, metadata, stream):
        heard.set_result((service, await stream.read()))

    machines.set_incoming(row.id, "session", handler)
    _, writer = await asyncio.open_unix_connection(tmp_path / "s" / f"{row.id}.sock")
    writer.write(b"hello")
    assert await asyncio.wait_for(heard, 30) == ("session", b"hello")
    writer.close()
    await writer.wait_closed()
    machines.set_incoming(row.id, "session", None)
