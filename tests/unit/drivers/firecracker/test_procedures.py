"""The driver's procedures against a program that plays Firecracker (fake_firecracker.py), under the real keeper, with a real
guestd: what needs no KVM to go wrong. Real guests: tests/conformance/test_driver_firecracker.py."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recess.config import load_config
from recess.drivers.firecracker import FirecrackerDriver, FirecrackerVm, start
from recess.drivers.firecracker.api import Refused
from recess.drivers.firecracker.calls import Call
from recess.drivers.firecracker.host import HostFacts
from recess.drivers.firecracker.journal import read_journal
from recess.drivers.firecracker.ledger import is_poisoned
from recess.drivers.kept.cgroup import Groups, Limits
from recess.drivers.kept.keeper import read_pids
from recess.drivers.kept.layout import layout_for
from recess.errors import Conflict, DriverFailed, IllegalState, InvalidSpec, MissingTool, RecessError
from recess.images.boot import build_initrd
from recess.machines.contract import Capture, Fingerprint, PageSet, RestoreParts, TemplateRef, VmSpec
from recess.testing.crash import crashing
from recess.testing.driver_suite import NO_PAGES, copy_pages, merge_pages
from recess.units import MIB, PAGE_BYTES
from tests.unit.drivers.firecracker.test_calls import make_spec

MEMORY = 64 * MIB
DISK = 4 * MIB
FINGERPRINT = Fingerprint("firecracker", "1", "kvm", "", (), "", "")


@dataclass
class Bench:
    """Machines under one run folder."""

    home: Path
    host: HostFacts
    spec: VmSpec
    vms: list[FirecrackerVm] = field(default_factory=list)
    number: int = 0
    limited: bool = True

    def place(self, name: str = "") -> start.Place:
        if not name:
            self.number += 1
            name = f"m{self.number}"
        layout = layout_for(self.home / "run", name, self.home / "machines" / name)
        return start.Place(layout, self.host, FINGERPRINT, 60, limited=self.limited)

    def keep(self, handles: Any) -> FirecrackerVm:
        self.vms.append(FirecrackerVm(handles))
        return self.vms[-1]

    async def boot(self, *, for_template: bool = False) -> FirecrackerVm:
        place = self.place()
        place.layout.directory.mkdir(parents=True)
        with place.layout.disk.open("wb") as disk:
            disk.write(b"d" * PAGE_BYTES)
            disk.truncate(DISK)
        return self.keep(await start.boot(place, self.spec, for_template=for_template))

    async def restore(self, parts: RestoreParts) -> FirecrackerVm:
        return self.keep(await start.restore(self.place(), self.spec, parts))

    async def adopt(self, vm: FirecrackerVm) -> FirecrackerVm:
        await vm.detach()
        place = replace(
            self.place(vm.id), fingerprint=replace(FINGERPRINT, driver_version="9")
        )  # there is a newer one now
        journal = read_journal(place.layout)
        assert journal is not None
        handles = await start.adopt(place, journal)
        assert handles is not None
        return self.keep(handles)

    async def template(self) -> TemplateRef:
        vm = await self.boot(for_template=True)
        return await vm.export_template(self.home / "template")

    async def fork(self, ref: TemplateRef, snapshot: str = "") -> FirecrackerVm:
        return await self.restore(RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes(), snapshot))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    config = load_config()
    program = Path(__file__).with_name("fake_firecracker.py")
    binary = tmp_path / "firecracker"
    guestd = config.bin_dir / "guestd"
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{program}" "{guestd}" "$@"\n')
    binary.chmod(0o755)
    boot = make_spec().boot
    files = {name: tmp_path / name for name in ("kernel", "initrd", "root")}
    for path in files.values():
        path.touch()
    files["initrd"].write_bytes(build_initrd(b"guestd", []))
    spec = make_spec(memory_bytes=MEMORY, disk_bytes=DISK, boot=replace(boot, **files))
    facts = HostFacts(binary, config.bin_dir / "keeper", (1, 16, 1), "a test", "", ())
    bench = Bench(tmp_path, facts, spec)
    yield bench
    for vm in reversed(bench.vms):  # who took over before who was taken over from
        await vm.kill()
    folder = tmp_path / "run" / "m"
    assert not folder.exists() or not list(folder.iterdir())
    assert not list((tmp_path / "machines").glob("*/disk*"))


def pages_of(capture: Capture) -> dict[int, int]:
    """Return the first byte of each page that a capture holds; the capture is closed."""
    data = np.frombuffer(capture.memory.data, np.uint8).reshape(-1, PAGE_BYTES)
    numbers = np.frombuffer(capture.memory.indices, "<u4")
    found = {int(n): int(row[0]) for n, row in zip(numbers, data, strict=True)}
    del data, numbers
    capture.close()
    return found


async def test_a_boot_a_live_capture_and_a_machine_that_goes_on(bench: Bench) -> None:
    vm = await bench.boot()
    await vm.link.ping(timeout_s=60)
    asked: list[str] = []

    async def before() -> None:
        await vm.link.ping(timeout_s=60)
        asked.append("before")

    async def after() -> None:
        await vm.link.ping(timeout_s=60)
        asked.append("after")

    link = vm.link
    capture = await vm.capture(resume=True, before_pause=before, after_resume=after)
    assert asked == ["before", "after"]
    assert vm.link is link
    assert capture.standstill_s > 0
    assert (capture.base, capture.parent, capture.generation) == ("boot", "", 1)
    assert np.frombuffer(capture.disk.indices, "<u4").tolist() == [0]
    assert pages_of(capture) == {1: 2, 2: 3}
    await link.ping(timeout_s=60)
    assert b"console of the guest" in vm.console_tail()
    assert (await vm.stats()).pss_bytes > 0
    assert sorted(p.name for p in vm._handles.layout.directory.iterdir()) == ["console.log", "disk.raw"]


async def test_what_the_description_does_not_take_would_be_refused(bench: Bench) -> None:
    """All other tests here ask only what it takes: this is how they would fail."""
    vm = await bench.boot()
    for call, said in (
        (Call("PATCH", "/vm", {"state": "Asleep"}), "may not be Asleep"),
        (Call("PUT", "/nothing", {}), "no such call"),
    ):
        with pytest.raises(Refused, match=said):
            await vm._handles.api.call(call)


async def test_pause_and_unpause_with_no_snapshot_between(bench: Bench) -> None:
    """The guest is told that its connections are gone before it runs on: else nothing would ever reach it again."""
    vm = await bench.boot()
    await vm.unpause()
    for _ in range(2):
        await vm.pause()
        await vm.pause()
        with pytest.raises(RecessError):
            await vm.link.ping(timeout_s=0.05)
        await vm.unpause()
        await vm.unpause()
        await vm.link.ping(timeout_s=60)
    first = await vm.capture(resume=True)
    await vm.committed(first, "snp_a")
    whole = pages_of(first)
    await vm.pause()
    second = await vm.capture(resume=False, parent="snp_a")
    assert second.standstill_s == 0.0
    assert second.parent == "snp_a"
    assert set(pages_of(second)).isdisjoint(whole)
    await vm.unpause()
    await vm.link.ping(timeout_s=60)


async def test_what_was_taken_in_between_two_captures_is_in_the_next(bench: Bench) -> None:
    vm = await bench.boot()
    first = await vm.capture(resume=True)
    await vm.pause()
    await vm.unpause()  # takes a Diff of its own
    await vm.committed(first, "snp_a")
    known = pages_of(first)
    delta = await vm.capture(resume=True, parent="snp_a")
    assert delta.parent == "snp_a"
    assert len(pages_of(delta)) == 2
    assert len(pages_of(await vm.capture(resume=True))) == len(known) + 3


async def test_a_capture_that_fails_poisons_the_list(bench: Bench) -> None:
    vm = await bench.boot()
    first = await vm.capture(resume=True)
    await vm.committed(first, "snp_a")
    before = pages_of(first)
    run = vm._handles.layout.run
    (run / "fail-create").touch()
    with pytest.raises(DriverFailed, match="No space left"):
        await vm.capture(resume=True, parent="snp_a")
    await vm.link.ping(timeout_s=60)
    assert is_poisoned(run)
    assert "lost" in vm.about_memory()["tracking_why"]
    with pytest.raises(DriverFailed):
        await vm.capture(resume=False)
    (run / "fail-create").unlink()
    await vm.link.ping(timeout_s=60)
    capture = await vm.capture(resume=True, parent="snp_a")
    assert capture.parent == ""
    assert set(before) < set(pages_of(capture))  # also what the lost lists named
    assert not is_poisoned(run)
    assert not list((run / "shm").glob("taken*"))


@pytest.mark.parametrize("point", ["firecracker.poisoned", "firecracker.taken", "firecracker.entered"])
async def test_a_server_that_dies_in_a_capture(bench: Bench, point: str) -> None:
    vm = await bench.boot()
    first = await vm.capture(resume=True)
    await vm.committed(first, "snp_a")
    seen = pages_of(first)
    with crashing(point):
        await vm.capture(resume=True, parent="snp_a")
    adopted = await bench.adopt(vm)
    await adopted.link.ping(timeout_s=60)
    capture = await adopted.capture(resume=True, parent="snp_a")
    assert capture.fingerprint == FINGERPRINT  # of the one that runs it
    assert capture.parent == ("snp_a" if point == "firecracker.entered" else "")
    found = pages_of(capture)
    if capture.parent:
        assert len(found) == 2
    else:
        assert set(seen) < set(found)


async def test_a_paused_machine_is_taken_over(bench: Bench) -> None:
    vm = await bench.boot()
    await vm.pause()
    adopted = await bench.adopt(vm)
    with pytest.raises(DriverFailed):
        _ = adopted.link
    await adopted.unpause()
    await adopted.link.ping(timeout_s=60)


async def test_forks_and_restores(bench: Bench) -> None:
    """A fork is mapped over the template's file; a restore has its own; what is captured counts from where it came."""
    ref = await bench.template()
    fork = await bench.fork(ref)
    assert not (fork._handles.layout.run / "shm" / "ram").exists()
    first = await fork.capture(resume=False, parent="snp_x")
    assert (first.base, first.parent) == ("template", "")
    parts = RestoreParts(ref, copy_pages(first.memory), copy_pages(first.disk), first.vmstate, "snp_a")
    given = pages_of(first)
    await fork.kill()
    child = await bench.restore(parts)
    delta = await child.capture(resume=True, parent="snp_a")
    assert delta.parent == "snp_a"
    own = merge_pages(parts.memory, copy_pages(delta.memory))
    assert set(pages_of(delta)).isdisjoint(given)
    whole = await child.capture(resume=True)
    assert set(np.frombuffer(own.indices, "<u4").tolist()) < set(pages_of(whole))
    with pytest.raises(IllegalState):
        await child.export_template(bench.home / "other")


async def test_a_device_state_that_makes_no_sense(bench: Bench) -> None:
    ref = await bench.template()
    with pytest.raises(DriverFailed, match="invalid magic"):
        await bench.restore(RestoreParts(ref, NO_PAGES, NO_PAGES, b"\0" * 64))


async def test_what_cannot_be_started(bench: Bench) -> None:
    ref = await bench.template()
    place = bench.place()
    with pytest.raises(InvalidSpec, match="no disk"):
        await start.boot(place, bench.spec, for_template=False)
    place.layout.directory.mkdir(parents=True, exist_ok=True)
    place.layout.disk.write_bytes(b"short")
    with pytest.raises(InvalidSpec, match="5 bytes"):
        await start.boot(place, bench.spec, for_template=False)
    place.layout.disk.unlink()
    with pytest.raises(DriverFailed, match="gone"):
        await bench.restore(RestoreParts(replace(ref, ram=Path("/gone")), NO_PAGES, NO_PAGES, b""))
    vm = await bench.fork(ref)
    with pytest.raises(Conflict):
        await start.boot(bench.place(vm.id), bench.spec, for_template=False)
    bench.host = replace(bench.host, binary=bench.home / "nowhere")
    with pytest.raises(DriverFailed):
        await bench.fork(ref)
    await vm.link.ping(timeout_s=60)


def test_a_kernel_without_the_channels_modules_is_told_of_before_anything_starts(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    for modules in ([], ["00-virtio.ko", "01-vmw_vsock_virtio_transport.ko"]):
        initrd.write_bytes(build_initrd(b"guestd", [(name, b"") for name in modules]))
        start.check_channel(initrd)
    initrd.write_bytes(build_initrd(b"guestd", [("00-virtio.ko", b"")]))
    with pytest.raises(MissingTool, match="vsock") as caught:
        start.check_channel(initrd)
    assert "current.json" in caught.value.hint


class Pager:
    """Lazy memory that is never asked for a page: notes what it was given."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.served: Sequence[tuple[int, int, int]] = ()
        self.whole = False
        self.closed = 0
        self.child = subprocess.Popen(["sleep", "600"])
        self.pidfd = os.pidfd_open(self.child.pid)

    async def ranges(self) -> int:
        return os.memfd_create("ranges")

    def process(self) -> int:
        return self.pidfd

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.pidfd)

    async def serve(
        self,
        uffd: int,
        pipe: int,
        vmm: int,
        segments: Sequence[tuple[int, int, int]],
        first: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> None:
        os.fstat(uffd)
        self.pipe, self.vmm = os.dup(pipe), os.dup(vmm)
        self.served, self.whole = segments, whole
        (self.run / "served").touch()

    async def read_all(self) -> PageSet:
        return NO_PAGES

    def about(self) -> Mapping[str, Any]:
        return {"state": "serving"}

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def make_pager(bench: Bench) -> Iterator[Callable[[], Pager]]:
    """What makes the pager of the next machine; their processes end with the test."""
    made: list[Pager] = []

    def make() -> Pager:
        made.append(Pager(bench.home / "run" / "m" / f"m{bench.number + 1}"))
        return made[-1]

    yield make
    for pager in made:
        pager.end()


async def test_memory_by_page_faults(
    bench: Bench, make_pager: Callable[[], Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firecracker waits for its pages inside the load; each is watched for the other, and the keeper ends the machine with
    the pager, whoever may still hold its pipe."""
    monkeypatch.setattr(start, "may_catch_faults", lambda **_: True)
    ref = await bench.template()
    pager = make_pager()
    state = ref.vmstate.read_bytes()
    vm = await bench.restore(RestoreParts(ref, NO_PAGES, NO_PAGES, state, "snp_a", lazy=pager, choice="lazy: a test"))
    assert (list(pager.served), pager.whole) == ([(0x7000_0000_0000, 0, MEMORY // PAGE_BYTES)], True)
    assert vm.about_memory()["memory"] == "lazy: a test"
    assert vm.about_memory()["pager_state"] == "serving"
    await vm.link.ping(timeout_s=60)
    capture = await vm.capture(resume=True, parent="snp_a")
    assert capture.parent == "snp_a"
    assert len(pages_of(capture)) == 1
    vmm = read_pids(vm._handles.layout)["vmm"].pid
    assert f"Pid:\t{vmm}\n" in Path(f"/proc/self/fdinfo/{pager.vmm}").read_text()
    os.close(pager.vmm)
    pager.child.kill()  # without a word
    assert "pager" in await asyncio.wait_for(vm.wait_dead(), 60)
    os.close(pager.pipe)


async def test_everything_of_a_machine_whose_memory_came_by_faults(
    bench: Bench, make_pager: Callable[[], Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "may_catch_faults", lambda **_: True)
    ref = await bench.template()
    pager = make_pager()
    vm = await bench.restore(RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes(), "snp_a", lazy=pager))
    waiting = asyncio.ensure_future(vm.capture(resume=True))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done  # all must be there first
    os.write(pager.pipe, b"filled")
    os.close(pager.pipe)
    os.close(pager.vmm)
    pager.child.kill()  # it has said its word: nothing ends with it now
    capture = await waiting
    assert capture.parent == ""
    capture.close()
    assert vm._handles.ledger.whole
    await vm.link.ping(timeout_s=60)


async def test_a_user_who_may_not_catch_faults(
    bench: Bench, make_pager: Callable[[], Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "may_catch_faults", lambda **_: False)
    ref = await bench.template()
    pager = make_pager()
    vm = await bench.restore(RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes(), lazy=pager))
    assert "may not catch page faults" in vm.about_memory()["memory"]
    assert pager.closed == 1
    await vm.link.ping(timeout_s=60)


async def test_a_machine_that_was_not_started_to_its_end_is_ended(bench: Bench) -> None:
    vm = await bench.boot()
    await vm.detach()
    place = bench.place(vm.id)
    journal = read_journal(place.layout)
    assert journal is not None
    assert await start.adopt(place, replace(journal, phase="starting")) is None
    assert not place.layout.run.exists()


async def test_a_machine_whose_firecracker_was_removed_does_not_run_on(bench: Bench, tmp_path: Path) -> None:
    """Nobody could take it over, and its row falls."""
    vm = await bench.boot()
    await vm.detach()
    ran = read_pids(vm._handles.layout)
    assert all(process.alive() for process in ran.values())
    driver = FirecrackerDriver(
        load_config({}, home=str(tmp_path), run_dir=str(tmp_path / "run"), firecracker_bin="/gone")
    )
    assert list(driver.list_leftovers()) == [vm.id]
    with pytest.raises(MissingTool):
        await driver.adopt(vm.id, tmp_path / "machines" / vm.id)
    assert list(driver.list_leftovers()) == []
    assert [name for name, process in ran.items() if process.alive()] == []


async def test_an_end_is_told_to_whoever_waits(bench: Bench) -> None:
    vm = await bench.boot()
    stalled = asyncio.ensure_future(vm.wait_stalled())
    assert await vm.stalled() == ""
    await vm.go_on()
    await vm.set_deadline(0.0)
    assert "deadline" in await asyncio.wait_for(vm.wait_dead(), 60)
    with pytest.raises(DriverFailed):
        await stalled
    with pytest.raises(DriverFailed, match="deadline"):
        await vm.capture(resume=True)


class Folders(Groups):
    """Folders that look like control groups: they have the file to join by, and no kernel behind them."""

    def make(self, limits: Limits) -> Path:
        made = super().make(limits)
        assert made is not None
        (made / "cgroup.procs").touch()
        return made


async def test_it_is_put_into_a_control_group_which_is_cleared_at_its_end(bench: Bench) -> None:
    """Whoever ends it knows the group: the server that started it, and a later one from the journal."""
    top = bench.home / "groups"
    top.mkdir()
    folders = Folders(top, ("cpu", "memory", "pids"), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "find", lambda: folders)
        one, other = await bench.boot(), await bench.boot()
        bench.limited = False
        free = await bench.boot()
    assert free._handles.journal.group == ""
    adopted = await bench.adopt(other)
    for vm in (one, adopted):
        group = Path(vm._handles.journal.group)
        assert group.parent == top
        assert (group / "cgroup.procs").read_text() == "0"  # what a process writes that joins
        limits = start.limits_of(bench.spec)
        assert limits.memory_bytes > 2 * MEMORY
        assert (group / "memory.max").read_text() == str(limits.memory_bytes)
        assert (group / "cpu.max").read_text() == f"{(bench.spec.cpus + 1) * 100_000} 100000"
        assert not (group / "cgroup.kill").exists()
        await vm.kill()
        assert (group / "cgroup.kill").read_text() == "1"
