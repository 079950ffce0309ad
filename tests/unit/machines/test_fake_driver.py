"""The fake driver beyond the conformance suite: its shell, its clock, its RNG, its way to die."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from recess.drivers.fake import FakeDriver, FakeHost
from recess.drivers.fake.driver import FakeVm
from recess.drivers.fake.shell import SyntaxProblem, parse
from recess.errors import DriverFailed, GuestFailed, NotFound, Timeout
from recess.guestlink.link import ExecRequest, Thaw
from recess.machines.contract import DISK_NAME, BootFiles, RestoreParts, VmSpec

SPEC = VmSpec(64 << 20, 1, 64 << 20, BootFiles(Path("k"), "k" * 64, Path("i"), "i" * 64, Path("r"), "r" * 64))


def thaw(**changes):
    values = {
        "wall_ns": time.time_ns(),
        "entropy": b"e" * 32,
        "generation": "g1",
        "epoch": 0,
        "hostname": "one",
        "machine_id": "a" * 32,
    }
    return Thaw(**(values | changes))


async def boot(driver: FakeDriver, vm_id: str, directory: Path, **options) -> FakeVm:
    directory.mkdir(exist_ok=True)
    with (directory / DISK_NAME).open("wb") as disk:
        disk.truncate(SPEC.disk_bytes)
    return await driver.boot(vm_id, SPEC, directory, **options)


async def sh(vm: FakeVm, script: str) -> tuple[int, str, str]:
    job = await vm.link.exec(ExecRequest(argv=["sh", "-c", script]))
    out = {0: b"", 1: b"", 2: b""}
    async for fd, data in job.output():
        out[fd] += data
    return await job.wait(), out[1].decode(), out[2].decode()


@pytest.fixture
async def vm(tmp_path):
    vm = await boot(FakeDriver(), "mch_1", tmp_path)
    yield vm
    await vm.kill()


@pytest.mark.parametrize(
    ("script", "code", "out"),
    [
        ("echo one two", 0, "one two\n"),
        ("echo -n a; echo b", 0, "ab\n"),
        ("false || echo no && echo yes", 0, "no\nyes\n"),
        ("false; echo $?", 0, "1\n"),
        ("X=5; echo \"v=$X\" '$X'", 0, "v=5 $X\n"),
        ("echo hi > /tmp/f; echo ho >> /tmp/f; cat /tmp/f | wc -l", 0, "2\n"),
        ("echo $(echo inner $(echo deep))", 0, "inner deep\n"),
        ("if test -e /etc; then echo there; else echo gone; fi", 0, "there\n"),
        ("N=0; while test $N -ne 1; do N=1; echo round; done", 0, "round\n"),
        ("cd /var && pwd", 0, "/var\n"),
        ("exit 7", 7, ""),
        ("echo a 2>/dev/null # remark", 0, "a\n"),
        ("exec echo done; echo never", 0, "done\n"),
    ],
)
async def test_shell(vm, script, code, out):
    assert (await sh(vm, script))[:2] == (code, out)


async def test_shell_says_what_it_does_not_know(vm):
    code, _, err = await sh(vm, "for i in 1 2; do echo $i; done")
    assert code == 2
    assert "for is not supported" in err
    assert (await sh(vm, "nosuch"))[0] == 127
    with pytest.raises(NotFound):
        await vm.link.exec(ExecRequest(argv=["nosuch"]))


@pytest.mark.parametrize("text", ["echo 'a", 'echo "a', "echo >", "while true; do", "$(echo", "&& a"])
def test_shell_syntax_errors(text):
    with pytest.raises(SyntaxProblem):
        parse(text)


async def test_memory_files_and_processes_go_through_template_capture_and_restore(tmp_path):
    driver = FakeDriver()
    (tmp_path / "t").mkdir()
    base = await boot(driver, "tpl_1", tmp_path / "b", for_template=True)
    await sh(base, "echo warm > /root/warm")
    await base.link.freeze(sync=True)
    template = await base.export_template(tmp_path / "t")
    assert template.ram.stat().st_size == SPEC.memory_bytes
    assert template.ram.stat().st_blocks * 512 < 1 << 20

    empty = RestoreParts(template, *await _nothing(), vmstate=template.vmstate.read_bytes())
    one = await driver.restore("mch_1", SPEC, empty, tmp_path / "1")
    assert (await one.link.info())["frozen"]
    await one.link.thaw(thaw())
    await sh(one, "echo nonce > /dev/shm/nonce; echo disk > /root/disk")
    sleeper = await one.link.exec(ExecRequest(argv=["sleep", "1000"], job_id="sleeper"))
    one.poke(40000, b"dirty")
    await one.link.freeze()
    capture = await one.capture(resume=False)
    await one.kill()
    with pytest.raises(GuestFailed):
        await sleeper.wait()

    two = await driver.restore(
        "mch_2", SPEC, RestoreParts(template, capture.memory, capture.disk, capture.vmstate), tmp_path / "2"
    )
    await two.link.thaw(thaw(hostname="two"))
    assert two.poked[40000].startswith(b"dirty")
    assert (await sh(two, "cat /dev/shm/nonce /root/disk /root/warm; hostname"))[1] == "nonce\ndisk\nwarm\ntwo\n"
    again = await two.link.attach("sleeper")
    await again.signal(signal.SIGTERM)
    assert await again.wait() == 143
    await two.kill()
    assert driver.list_leftovers() == []


async def _nothing():
    from recess.machines.contract import PageSet

    return PageSet(memoryview(b""), memoryview(b"")), PageSet(memoryview(b""), memoryview(b""))


async def test_two_restores_of_one_capture_share_random_bytes_until_reseeded(tmp_path, vm):
    driver = FakeDriver()
    await vm.link.freeze()
    capture = await vm.capture(resume=False)
    parts = RestoreParts(None, capture.memory, capture.disk, capture.vmstate)
    twins = [await driver.restore(f"mch_{i}", SPEC, parts, tmp_path / str(i)) for i in range(4)]
    for twin in twins[:2]:
        await twin.link.unfreeze()
    draws = [(await sh(t, "head -c 16 /dev/urandom | base64"))[1] for t in twins[:2]]
    assert draws[0] == draws[1]
    for n, twin in enumerate(twins[2:]):
        await twin.link.thaw(thaw(entropy=bytes([n]) * 32))
    draws = [(await sh(t, "head -c 16 /dev/urandom | base64"))[1] for t in twins[2:]]
    assert draws[0] != draws[1]
    for twin in twins:
        await twin.kill()


async def test_frozen_workload_stands_still_and_paused_guest_is_silent(vm):
    job = await vm.link.exec(ExecRequest(argv=["sh", "-c", "while true; do echo tick; sleep 0.001; done"]))
    stream = job.output()
    await anext(stream)
    await vm.link.freeze()
    ring = vm.guest.memory.jobs[job.job_id]
    seen = ring.ring_start + len(ring.ring)
    await asyncio.sleep(0.02)
    assert ring.ring_start + len(ring.ring) == seen
    await vm.pause()
    with pytest.raises(Timeout):
        await vm.link.ping(0.02)
    await vm.unpause()
    await vm.link.unfreeze()
    for _ in range(3):
        await anext(stream)
    await stream.aclose()


async def test_deaths(tmp_path):
    host = FakeHost()
    driver = FakeDriver(host=host)
    host.die_at = "boot"
    with pytest.raises(DriverFailed):
        await boot(driver, "mch_1", tmp_path)
    vm = await boot(driver, "mch_1", tmp_path)
    host.die_at = "capture"
    with pytest.raises(DriverFailed):
        await vm.capture(resume=True)
    assert (await sh(vm, "echo still here"))[1] == "still here\n"
    await vm.set_deadline(0.01)
    assert await vm.wait_dead() == "deadline passed"
    with pytest.raises(GuestFailed):
        await vm.link.ping()
    assert await FakeDriver(host=host).adopt("mch_1", tmp_path) is None


async def test_streams_both_ways(vm):
    heard = []

    async def handler(service, metadata, stream):
        heard.append((service, dict(metadata), await stream.read()))
        await stream.write(b"answer")
        await stream.close()

    vm.link.serve_incoming(handler)
    outward = await vm.guest.open_out("session", {"peer": 1})
    await outward.write(b"hello")
    assert await outward.read() == b"answer"
    assert heard == [("session", {"peer": 1}, b"hello")]

    await vm.link.write_file("/srv/index.html", b"<h1>up</h1>")
    await vm.link.exec(ExecRequest(argv=["python3", "-m", "http.server", "8000"], cwd="/srv"))
    await asyncio.sleep(0)
    while 8000 not in vm.guest.listeners:
        await asyncio.sleep(0)
    inward = await vm.link.dial(8000)
    await inward.write(b"GET / HTTP/1.0\r\n\r\n")
    page = b""
    while chunk := await inward.read():
        page += chunk
    assert page.endswith(b"<h1>up</h1>")
    with pytest.raises(GuestFailed):
        await vm.link.dial(1)
