"""What real gVisor machines cost and keep, beyond the conformance suite."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import io
import shutil
import tarfile
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from recess.drivers.gvisor import GvisorDriver, start
from recess.drivers.gvisor import journal as paths
from recess.drivers.gvisor.handles import processes
from recess.drivers.gvisor.journal import write_journal
from recess.drivers.kept.cgroup import Groups
from recess.drivers.kept.keeper import read_pids
from recess.errors import DriverFailed, GuestFailed, MissingTool
from recess.guestlink.link import ExecRequest
from recess.machines.contract import PageSet
from recess.testing.driver_suite import new_thaw, quiet_capture, shell
from recess.testing.gvisor_rig import GvisorHome, GvisorRig, has_runsc, machine_processes
from tests.machines.ordinary_user import play_as_nobody

BLOB_PAGES = (32 << 20) // 4096


@pytest.fixture
def rig(tmp_path: Path, images_dir: Path) -> GvisorRig:
    if not has_runsc():
        pytest.skip("runsc is not installed")
    home = GvisorHome.shared(images_dir)
    return GvisorRig(home=tmp_path, spec=home.spec, gvisor=home)


@pytest.fixture
async def vm(rig: GvisorRig):
    made = await rig.fork(rig.make_driver())
    yield made
    await made.kill()
    assert rig.leftovers() == []


def by_number(pages: PageSet) -> dict[int, bytes]:
    numbers = np.frombuffer(pages.indices, "<u4")
    return {int(n): bytes(pages.data[i * 4096 : (i + 1) * 4096]) for i, n in enumerate(numbers)}


async def test_unchanged_pages_keep_their_numbers(rig, vm):
    """In a live machine, and in one restored from its capture: only what changed differs, though gVisor moves pages."""
    job = await vm.link.exec(
        ExecRequest(
            ["python3", "-c", "import os,time\nblob=os.urandom(32<<20)\nprint('made',flush=True)\ntime.sleep(999)"]
        )
    )
    async for _stream, data in job.output():
        assert data == b"made\n"
        break
    await job.detach()
    first = await quiet_capture(vm, resume=True)
    before = by_number(first.memory)
    assert len(before) > BLOB_PAGES
    first.close()
    await shell(vm.link, "echo more > /root/file")
    second = await quiet_capture(vm, resume=True)
    after = by_number(second.memory)
    assert sum(before.get(n) != page for n, page in after.items()) < 500
    child = await rig.restore(rig.make_driver(), await rig.parts_of(second))
    try:
        third = await quiet_capture(child, resume=True)
        again = by_number(third.memory)
        third.close()
        assert sum(after.get(n) != page for n, page in again.items()) < 500
        assert await shell(child.link, "cat /root/file") == "more"
    finally:
        await child.kill()


async def test_a_new_server_knows_the_pages_too(rig, vm):
    first = await quiet_capture(vm, resume=True)
    count = first.memory.count
    first.close()
    await rig.lose(vm)
    adopted = await rig.make_driver().adopt(vm.id, vm._handles.layout.directory)
    assert adopted is not None
    second = await quiet_capture(adopted, resume=True)
    assert second.memory.count < count + 300  # what equals the template's is still seen to
    second.close()
    await adopted.kill()


async def test_a_snapshot_is_of_the_runsc_that_runs_the_machine(rig, vm, tmp_path):
    """Whatever the host has by the time a new server takes it over: a snapshot tells which build can restore it."""
    before = await rig.make_driver().fingerprint(rig.spec)
    newer = Path(shutil.copy(rig.gvisor.config.runsc_bin, tmp_path / "runsc"))
    with newer.open("ab") as program:
        program.write(b"\0")
    driver = GvisorDriver(dataclasses.replace(rig.gvisor.config, runsc_bin=str(newer)))
    assert await driver.fingerprint(rig.spec) != before
    await rig.lose(vm)
    adopted = await driver.adopt(vm.id, vm._handles.layout.directory)
    assert adopted is not None
    capture = await quiet_capture(adopted, resume=True)
    assert capture.fingerprint == before
    capture.close()
    await adopted.kill()


async def test_its_monotonic_clock_goes_on_while_it_sleeps(rig, vm):
    """A VM's stands still; gVisor's does not: a wait that was begun before is over as soon as its time is."""
    ask = "python3 -c 'import time; print(time.monotonic())'"
    before = float(await shell(vm.link, ask))
    slept = time.monotonic()
    parts = await rig.parts_of(await quiet_capture(vm, resume=False))
    await vm.kill()
    child = await rig.restore(rig.make_driver(), parts)
    asleep_s = time.monotonic() - slept
    try:
        ahead_s = float(await shell(child.link, ask)) - before
        print(f"asleep for {asleep_s:.2f} s, the clock went ahead by {ahead_s:.2f} s")
        assert ahead_s > asleep_s * 0.95
    finally:
        await child.kill()


_TALK = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(listening.getsockname())
far, _ = listening.accept()
for line in sys.stdin:
    near.sendall(line.encode())
    print(far.recv(100).decode(), end="", flush=True)
"""


async def test_connections_inside_go_on(rig, vm):
    """gVisor refuses a snapshot, or cuts them (`--net-disconnect-ok`), only for connections beyond the loopback, and there is no
    network but that."""
    job = await vm.link.exec(ExecRequest(["python3", "-c", _TALK], stdin=True, job_id="talk"))
    await job.write(b"before\n")
    async for _stream, data in job.output():
        assert data == b"before\n"
        break
    await job.detach()
    parts = await rig.parts_of(await quiet_capture(vm, resume=False))
    await vm.kill()
    child = await rig.restore(rig.make_driver(), parts)
    try:
        again = await child.link.attach("talk")
        await again.write(b"after\n")
        await again.close_stdin()
        assert b"after\n" in b"".join([data async for _stream, data in again.output()])
        assert await again.wait() == 0
    finally:
        await child.kill()


async def test_commands_of_the_past_are_in_no_snapshot(vm):
    """gVisor would keep the folder in /proc of every process that ever ran."""

    async def size() -> int:
        capture = await quiet_capture(vm, resume=True)
        capture.close()
        return len(capture.vmstate)

    await shell(vm.link, "i=0; while [ $i -lt 30 ]; do /bin/true; i=$((i+1)); done")
    for _ in range(20):
        await shell(vm.link, "true")
    settled = await size()
    for _ in range(40):
        await shell(vm.link, "true")
    assert await size() < settled + 1_000_000


@pytest.mark.parametrize("life", ["booted", "forked"])
async def test_a_server_that_reads_late_misses_nothing(rig, life):
    """Several commands write more than all buffers hold on the way to a server that is busy elsewhere: they wait."""
    vm = await rig.live(rig.make_driver(), life)
    try:
        below = vm._handles.port._lasting.below
        jobs = [await vm.link.exec(ExecRequest(["head", "-c", "3000000", "/dev/zero"])) for _ in range(4)]
        below.pause_reading()
        await _until_full(below.get_extra_info("socket").fileno())
        below.resume_reading()
        for job in jobs:
            assert sum([len(data) async for _stream, data in job.output()]) == 3_000_000
            assert await job.wait() == 0
    finally:
        await vm.kill()


async def _until_full(fd: int) -> None:
    """Return when what waits to be read here grows no more."""
    seen: list[int] = []
    while len(seen) < 20 or len(set(seen[-20:])) > 1 or seen[-1] < 65536:
        queued = bytearray(4)
        fcntl.ioctl(fd, termios.FIONREAD, queued)
        seen.append(int.from_bytes(queued, "little"))
        await asyncio.sleep(0.01)  # a buffer that fills is no event


async def test_a_terminal_and_its_output_go_on_over_captures(vm):
    """The link is the same before and after: who is attached sees every line once, in order."""
    script = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.02; done"
    job = await vm.link.exec(ExecRequest(["sh", "-c", script]))
    link = vm.link

    async def collect() -> bytes:
        return b"".join([data async for _stream, data in job.output()])

    reading = asyncio.ensure_future(collect())
    for _ in range(3):
        (await quiet_capture(vm, resume=True)).close()
        await vm.pause()
        await vm.unpause()
    assert (await asyncio.wait_for(reading, 60)).decode().splitlines() == [f"line {i}" for i in range(40)]
    assert await job.wait() == 0
    assert vm.link is link


async def test_two_forks_share_no_random_bytes_nor_names(rig):
    driver = rig.make_driver()
    one, two = await asyncio.gather(rig.fork(driver), rig.fork(driver))
    try:
        asked = "head -c 32 /dev/urandom | od -An -tx1; cat /etc/machine-id; hostname"
        first, second = await asyncio.gather(shell(one.link, asked), shell(two.link, asked))
        assert not set(first.splitlines()) & set(second.splitlines())
    finally:
        await asyncio.gather(one.kill(), two.kill())


async def test_thaw_hooks_run_and_fail_closed(vm):
    hook = "/etc/recess/thaw.d/one"
    await vm.link.write_file(hook, b"#!/bin/sh\necho ran > /root/hook\n", 0o755)
    await vm.link.freeze()
    await vm.link.thaw(new_thaw())
    assert await shell(vm.link, "cat /root/hook") == "ran"
    await vm.link.write_file(hook, b"#!/bin/sh\nexit 3\n", 0o755)
    await vm.link.freeze()
    with pytest.raises(GuestFailed, match="one"):
        await vm.link.thaw(new_thaw())
    assert (await vm.link.info())["frozen"] is True


@pytest.fixture
def groups() -> Groups:
    found = Groups.find()
    if found.top is None:
        pytest.skip(found.why)
    return found


async def test_all_of_it_is_within_its_limits(rig, groups):
    """Every process of a fork is in one control group of its own, over a capture too, and the group ends with the machine."""
    vm = await rig.fork(rig.make_driver())
    try:
        own = Path(vm._handles.journal.group)
        assert own.parent == groups.top
        await shell(vm.link, "sleep 999 >/dev/null 2>&1 &")
        (await quiet_capture(vm, resume=True)).close()
        keeper = read_pids(vm._handles.layout)["keeper"].pid
        inside = {int(pid) for pid in (own / "cgroup.procs").read_text().split()}
        assert {process.pid for process in processes(vm._handles.layout)} - inside == {keeper}
        limits = start.limits_of(rig.spec)
        assert (own / "memory.max").read_text().strip() == str(limits.memory_bytes)
        assert (own / "pids.max").read_text().strip() == str(limits.processes)
        assert 0 < int((own / "memory.peak").read_text()) < limits.memory_bytes // 2
        await rig.lose(vm)
        adopted = await rig.make_driver().adopt(vm.id, vm._handles.layout.directory)
        assert adopted is not None
        vm = adopted
    finally:
        await vm.kill()
    assert not own.exists()
    assert rig.leftovers() == []


async def test_one_that_takes_much_more_than_it_has_meets_its_limits(rig, groups):
    """Its files are its memory: what it writes beyond the limit ends it, and its end says why."""
    vm = await rig.fork(rig.make_driver())
    own = Path(vm._handles.journal.group)
    try:
        too_much = start.limits_of(rig.spec).memory_bytes + (64 << 20)  # of zeros, which gVisor keeps, too
        await vm.link.exec(ExecRequest(["sh", "-c", f"dd if=/dev/zero of=/root/much bs=16M count={too_much >> 24}"]))
        assert "it wanted more memory than its limit" in await asyncio.wait_for(vm.wait_dead(), 120)
    finally:
        await vm.kill()
    assert not own.exists()
    assert rig.leftovers() == []


async def test_a_terminal(vm):
    """The kernel has no TIOCGPTPEER; an interactive shell on a pty runs all the same, and goes on in a copy."""
    job = await vm.link.exec(ExecRequest(["sh"], tty=True, stdin=True, job_id="shell"))
    await job.write(b"test -t 0 && echo on-$((40 + 2)); kept=7\n")
    seen = b""
    async for _stream, data in job.output():
        seen += data
        if b"on-42" in seen:
            break
    await job.detach()
    (await quiet_capture(vm, resume=True)).close()
    again = await vm.link.attach("shell")
    await again.write(b"echo kept-$kept; exit\n")
    after = b"".join([data async for _stream, data in again.output()])
    assert b"kept-7" in after


async def test_it_has_as_many_processors_as_it_asked_for(rig):
    """Booted, and restored from a capture, also by a host that gave it none in particular."""
    vm = await rig.boot(rig.make_driver())
    try:
        assert await shell(vm.link, "nproc") == str(rig.spec.cpus)
        parts = await rig.parts_of(await quiet_capture(vm, resume=False))
    finally:
        await vm.kill()
    child = await rig.restore(rig.make_driver(), parts)
    assert await shell(child.link, "nproc") == str(rig.spec.cpus)
    await child.kill()


def test_an_ordinary_user_can_do_all_of_it(images_dir: Path) -> None:
    """The story of `test_driver_qemu`, as a user without rights, which root becomes for it. Inside there are all users."""
    if not has_runsc():
        pytest.skip("runsc is not installed")
    play_as_nobody("gvisor", images_dir)


async def test_probe_runs_a_program(rig):
    found = await rig.make_driver().probe(fresh=True)
    assert found["platform"] == "systrap"
    assert found["version"]


async def test_a_server_that_died_in_a_capture_leaves_a_machine_that_runs(rig, vm):
    """The mark says what it was before; the next server puts it right, and the half-written image goes."""
    await shell(vm.link, "echo here > /dev/shm/who")
    handles = vm._handles
    await handles.port.leave()
    handles.layout.capturing.write_text("running")
    await handles.command("pause")
    paths.image(handles.layout).mkdir()
    await rig.lose(vm)
    adopted = await rig.make_driver().adopt(vm.id, handles.layout.directory)
    assert adopted is not None
    assert await shell(adopted.link, "cat /dev/shm/who") == "here"
    assert not paths.image(handles.layout).exists()
    assert not handles.layout.capturing.exists()
    await adopted.kill()


async def test_a_start_that_was_not_finished_is_ended(rig, vm):
    handles = vm._handles
    write_journal(handles.layout, dataclasses.replace(handles.journal, phase="starting"))
    await rig.lose(vm)
    assert await rig.make_driver().adopt(vm.id, handles.layout.directory) is None
    assert machine_processes(rig.gvisor.run_dir) == []


async def test_a_machine_whose_runsc_was_removed_does_not_run_on(rig, vm):
    """Nobody could take it over, and its row falls."""
    await rig.lose(vm)
    driver = GvisorDriver(dataclasses.replace(rig.gvisor.config, runsc_bin="/gone"))
    with pytest.raises(MissingTool):
        await driver.adopt(vm.id, vm._handles.layout.directory)
    assert list(driver.list_leftovers()) == []
    assert machine_processes(rig.gvisor.run_dir) == []


async def test_a_capture_that_fails_leaves_the_machine_as_it_was(vm):
    """gVisor cannot write where something is in its way; running or paused, the machine goes on, and says what failed."""
    await shell(vm.link, "echo here > /dev/shm/who")
    in_the_way = paths.image(vm._handles.layout)
    in_the_way.write_text("a file")
    with pytest.raises(DriverFailed, match="checkpoint"):
        await quiet_capture(vm, resume=False)
    await vm.link.unfreeze()
    assert await shell(vm.link, "cat /dev/shm/who") == "here"
    await vm.pause()
    with pytest.raises(DriverFailed, match="checkpoint"):
        await vm.capture(resume=True)
    assert vm._handles.status() == "paused"
    in_the_way.unlink()
    await vm.unpause()
    (await quiet_capture(vm, resume=True)).close()


async def test_a_cancelled_capture_leaves_the_machine_running(vm):
    work = asyncio.ensure_future(vm.capture(resume=True))
    await asyncio.sleep(0.05)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert await shell(vm.link, "echo alive") == "alive"


async def test_archives_are_unpacked_without_openat2(vm):
    """gVisor lacks the call; what leads out of the folder lands inside it all the same."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, target in (("d/link", "/etc"), ("d/up", "../../..")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        info = tarfile.TarInfo("d/sub/file")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))

    async def pieces():
        yield held.getvalue()

    await shell(vm.link, "mkdir /root/t")
    await vm.link.put_tar("/root/t", pieces())
    assert await shell(vm.link, "cat /root/t/d/sub/file; readlink /root/t/d/link") == "hello/etc"
