"""The fake driver and its VMs: the whole driver contract in memory, with real pages and real template files.

`FakeHost` plays the machine room: VMs live in it, not in the driver, so a second driver object (a restarted server)
adopts them. It must never know of sessions, names, stores or compression, exactly like a real driver.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from recess.drivers.fake.guest import FakeGuest, Program
from recess.drivers.fake.link import FakeLink
from recess.drivers.fake.pages import POKE_FIRST, Pages, Writes, as_pages, changed, decode, encode
from recess.drivers.fake.programs import standard_programs
from recess.errors import BadInput, Corrupt, DriverFailed, IllegalState, InvalidSpec, Unsupported
from recess.machines.contract import (
    DISK_NAME,
    Capabilities,
    Capture,
    Fingerprint,
    Hook,
    KeptReady,
    RestoreParts,
    TemplateRef,
    VmSpec,
    VmStats,
)
from recess.units import PAGE_BYTES

_CONSOLE_BYTES = 65536
_VMSTATE = b"fake-vmstate-1 "


def _device_state() -> bytes:
    """Return a device state that, like a real one, is never twice the same."""
    return _VMSTATE + secrets.token_bytes(64)


@dataclass
class FakeHost:
    """Where fake VMs run. `die_at` names the next call that fails as a dying VMM would: boot, restore, capture."""

    vms: dict[str, FakeVm] = field(default_factory=dict)
    die_at: str = ""

    def maybe_die(self, call: str) -> None:
        """Fail once when this call was chosen."""
        if self.die_at == call:
            self.die_at = ""
            raise DriverFailed(f"fake VMM died during {call}", log=f"fake: dying at {call}")


def _check_spec(spec: VmSpec) -> None:
    if spec.network == "full":
        raise Unsupported("the fake driver has no network cards")


def _read_pages(path: Path, pages_total: int) -> Pages:
    """Return the non-zero pages of a sparse file (data extents only), at most `pages_total`."""
    pages: Pages = {}
    zero = bytes(PAGE_BYTES)
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            for offset in range(at - at % PAGE_BYTES, hole, PAGE_BYTES):
                page = os.pread(file.fileno(), PAGE_BYTES, offset).ljust(PAGE_BYTES, b"\0")
                if page != zero and offset // PAGE_BYTES < pages_total:
                    pages[offset // PAGE_BYTES] = page
            at = hole
    return pages


def _write_pages(path: Path, pages: Pages, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for number, page in sorted(pages.items()):
            file.seek(number * PAGE_BYTES)
            file.write(page)


class FakeVm:
    """One fake VM. `poke` dirties a page directly, for tests of large or odd memory."""

    def __init__(self, host: FakeHost, driver: FakeDriver, vm_id: str, spec: VmSpec, guest: FakeGuest) -> None:
        self.id = vm_id
        self.spec = spec
        self.guest = guest
        self.directory = Path()
        self.base = "boot"
        self.for_template = False
        self.poked: dict[int, bytes] = {}
        self._host = host
        self._driver = driver
        self._base_memory: Pages = {}
        self._base_disk: Pages = {}
        self._writes = Writes("", {}, {})
        self._link = FakeLink(guest)
        self.room = True
        self._stalled = asyncio.Event()
        self._stall_reason = ""
        self._dead = asyncio.Event()
        self._reason = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._dying: asyncio.Task[None] | None = None
        self._console = bytearray(b"fake guest: guestd is up\n")

    def set_base(self, name: str, memory: Pages, disk: Pages) -> None:
        """Say what captures are relative to."""
        self.base, self._base_memory, self._base_disk = name, memory, disk

    def set_snapshot(self, name: str, memory: Pages, disk: Pages) -> None:
        """Say which snapshot it was restored from ("" for none), and what its parts were then."""
        self._writes = Writes(name, memory, disk)

    @property
    def link(self) -> FakeLink:
        """The guest channel."""
        return self._link

    def relink(self) -> None:
        """Make a fresh channel, as an adopting server does."""
        self._link = FakeLink(self.guest)

    def poke(self, page: int, data: bytes) -> None:
        """Write one page of guest memory (page number from `pages.POKE_FIRST` upwards)."""
        self.poked[page] = data.ljust(PAGE_BYTES, b"\0")[:PAGE_BYTES]

    def _check(self) -> None:
        if self._dead.is_set():
            raise DriverFailed(f"fake VM {self.id} is dead: {self._reason}")

    async def pause(self) -> None:
        """Stop the vCPUs."""
        self._check()
        self.guest.stop_vcpus()

    async def unpause(self) -> None:
        """Let the vCPUs run."""
        self._check()
        self.guest.run_vcpus()

    def _now_pages(self) -> tuple[Pages, Pages]:
        memory = encode(msgspec.msgpack.encode(self.guest.memory), self.poked)
        return memory, encode(msgspec.msgpack.encode(self.guest.disk), {})

    async def capture(
        self,
        *,
        resume: bool,
        before_pause: Hook | None = None,
        after_resume: Hook | None = None,
        parent: str = "",
        disk_too: bool = False,
    ) -> Capture:
        """Take memory, disk and device state of one instant."""
        self._check()
        was_running = self.guest.vcpus.is_set()
        if before_pause is not None:
            await before_pause()
            self._check()
        start = time.perf_counter()
        self.guest.stop_vcpus()
        try:
            self._host.maybe_die("capture")
            memory, disk = self._now_pages()
            fingerprint = await self._driver.fingerprint(self.spec)
        except BaseException:
            if was_running:
                self.guest.run_vcpus()
            raise
        if resume and was_running:
            self.guest.run_vcpus()
        standstill = time.perf_counter() - start
        if resume and was_running and after_resume is not None:
            await after_resume()
        delta = self._writes.delta(memory, disk, parent)
        whole = (changed(memory, self._base_memory), changed(disk, self._base_disk))
        return Capture(
            memory=(delta or whole)[0], disk=(delta if delta is not None and disk_too else whole)[1],
            vmstate=_device_state(), base=self.base, fingerprint=fingerprint,
            standstill_s=standstill if resume else 0.0, memory_pages_total=self.spec.memory_bytes // PAGE_BYTES,
            disk_blocks_total=self.spec.disk_bytes // PAGE_BYTES, timings_s={"pages": standstill},
            parent="" if delta is None else parent, disk_parent="" if delta is None or not disk_too else parent,
            generation=self._writes.capture(memory, disk),
        )  # fmt: skip

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Have the next captures count from this snapshot."""
        self._check()
        self._writes.committed(0 if capture is None else capture.generation, snapshot)

    def about_memory(self) -> Mapping[str, str]:
        """Say how changes are known."""
        return {"tracking": "exact", "tracking_why": "its pages are compared"}

    async def export_template(self, directory: Path) -> TemplateRef:
        """End this VM and leave its parts as files."""
        self._check()
        if not self.for_template:
            raise IllegalState(f"fake VM {self.id} was not booted for a template")
        self.guest.stop_vcpus()
        ref = TemplateRef(self.id, directory / "ram", directory / "disk", directory / "vmstate")
        self._write_template(ref)
        await self.kill()
        return ref

    def _write_template(self, ref: TemplateRef) -> None:
        ref.ram.parent.mkdir(parents=True, exist_ok=True)
        memory, disk = self._now_pages()
        _write_pages(ref.ram, memory, self.spec.memory_bytes)
        _write_pages(ref.disk, disk, self.spec.disk_bytes)
        ref.vmstate.write_bytes(_device_state())

    async def detach(self) -> None:
        """Let go of the VM; it stays in the host."""
        await self._link.cut("this server let go of it")

    async def kill(self) -> None:
        """End the VM and remove its disk; may be called twice. A hard link to the disk keeps what the guest wrote."""
        disk = self.directory / DISK_NAME
        alone = not disk.exists() or disk.stat().st_nlink == 1
        await self._end("killed", write_disk=not alone)
        disk.unlink(missing_ok=True)

    async def die(self, reason: str) -> None:
        """End the VM for this reason, as a crash would: the disk stays, with everything the guest wrote to it."""
        await self._end(reason, write_disk=True)

    async def _end(self, reason: str, *, write_disk: bool) -> None:
        if self._dead.is_set():
            return
        self._reason = reason
        self._dead.set()
        self._host.vms.pop(self.id, None)
        if self._deadline is not None:
            self._deadline.cancel()
        self.guest.stop_vcpus()
        if write_disk:
            _write_pages(self.directory / DISK_NAME, self._now_pages()[1], self.spec.disk_bytes)
        await self._link.cut(f"the VM is dead: {reason}")
        await self.guest.stop()

    def stall(self, reason: str) -> None:
        """Stand still as when the host's disk is full. While `room` is False, `go_on` does not help."""
        self.guest.stop_vcpus()
        self._stall_reason = reason
        self._stalled.set()

    async def stalled(self) -> str:
        """Tell whether it stands still."""
        self._check()
        return self._stall_reason if self._stalled.is_set() else ""

    async def wait_stalled(self) -> str:
        """Return when it stands still."""
        waits = {asyncio.ensure_future(self._stalled.wait()), asyncio.ensure_future(self._dead.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        self._check()
        return self._stall_reason

    async def go_on(self) -> None:
        """Run again, if there is room."""
        self._check()
        if self._stalled.is_set() and self.room:
            self._stalled.clear()
            self.guest.run_vcpus()

    async def wait_dead(self) -> str:
        """Return the reason when the VM is gone."""
        await self._dead.wait()
        return self._reason

    async def set_deadline(self, seconds: float | None) -> None:
        """Die this many seconds from now, unless set again."""
        self._check()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._dying = asyncio.get_running_loop().create_task(self.die("deadline passed"))

    def console_tail(self, limit: int = _CONSOLE_BYTES) -> bytes:
        """Return the last bytes of the console."""
        return bytes(self._console[-limit:])

    async def stats(self) -> VmStats:
        """Return plausible numbers from the real page counts."""
        self._check()
        memory, _ = self._now_pages()
        private = len(memory) * PAGE_BYTES
        return VmStats(pss_bytes=private, cpu_s=self.guest.uptime_s() * 0.01, private_bytes=private)


class FakeDriver:
    """Fulfils `recess.machines.contract.Driver`. `programs` adds to (or replaces) what guests can run. Another `name` makes
    it another driver, whose snapshots this one refuses."""

    def __init__(
        self, *, host: FakeHost | None = None, programs: Mapping[str, Program] | None = None, name: str = "fake"
    ) -> None:
        self.name = name
        self.capabilities = Capabilities(
            snapshot=True, fork=True, live_snapshot=True, dirty_tracking=True, own_kernel=False, early_start=True
        )
        self.host = host if host is not None else FakeHost()
        self.programs = standard_programs() | dict(programs or {})
        self.version = "1"

    async def probe(self, *, fresh: bool = False) -> Mapping[str, Any]:
        """Say what this driver is; it is always there."""
        return {"driver": self.name, "version": self.version, "accelerator": "none"}

    async def fingerprint(self, spec: VmSpec) -> Fingerprint:
        """Return the fake's fingerprint; `version` may be changed to play another host."""
        return Fingerprint(self.name, self.version, "none", "fake", (), "fake", spec.boot.kernel_hash)

    def _make(self, vm_id: str, spec: VmSpec, guest: FakeGuest, directory: Path) -> FakeVm:
        if vm_id in self.host.vms:
            raise BadInput(f"fake VM {vm_id} runs already")
        directory.mkdir(parents=True, exist_ok=True)
        vm = FakeVm(self.host, self, vm_id, spec, guest)
        vm.directory = directory
        self.host.vms[vm_id] = vm
        return vm

    async def boot(self, vm_id: str, spec: VmSpec, directory: Path, *, for_template: bool = False) -> FakeVm:
        """Cold-boot a guest on the disk that is there: a blank one, or one that an earlier VM left."""
        _check_spec(spec)
        disk = directory / DISK_NAME
        if not disk.is_file() or disk.stat().st_size != spec.disk_bytes:
            raise InvalidSpec(f"there is no disk of {spec.disk_bytes} bytes in {directory}")
        self.host.maybe_die("boot")
        pages = _read_pages(disk, spec.disk_bytes // PAGE_BYTES)
        try:
            written = decode(lambda n: pages.get(n, bytes(PAGE_BYTES))) if pages else b""
            guest = FakeGuest.booted(self.programs, written)
        except (msgspec.ValidationError, msgspec.DecodeError) as exc:
            raise Corrupt(f"fake guest: {exc}") from exc
        vm = self._make(vm_id, spec, guest, directory)
        vm.for_template = for_template
        vm.guest.run_vcpus()
        return vm

    async def restore(self, vm_id: str, spec: VmSpec, parts: RestoreParts, directory: Path) -> FakeVm:
        """Bring a guest back from pages over its template (or zeros)."""
        _check_spec(spec)
        base_memory: Pages = {}
        base_disk: Pages = {}
        if parts.template is not None:
            base_memory = _read_pages(parts.template.ram, spec.memory_bytes // PAGE_BYTES)
            base_disk = _read_pages(parts.template.disk, spec.disk_bytes // PAGE_BYTES)
        self.host.maybe_die("restore")
        parts = await parts.whole()
        if not parts.vmstate.startswith(_VMSTATE):
            raise DriverFailed("fake VMM: the device state is not ours")
        memory = base_memory | as_pages(parts.memory)
        disk = base_disk | as_pages(parts.disk)
        zero = bytes(PAGE_BYTES)
        try:
            guest = FakeGuest.thawable(
                self.programs, decode(lambda n: memory.get(n, zero)), decode(lambda n: disk.get(n, zero))
            )
        except (msgspec.ValidationError, msgspec.DecodeError) as exc:
            raise Corrupt(f"fake guest: {exc}") from exc
        vm = self._make(vm_id, spec, guest, directory)
        _write_pages(directory / DISK_NAME, {}, spec.disk_bytes)  # filled when the VM ends: only its size is looked at
        vm.poked = {n: p for n, p in memory.items() if n >= POKE_FIRST and p != zero}
        vm.set_base("template" if parts.template is not None else "boot", base_memory, base_disk)
        vm.set_snapshot(parts.snapshot, memory, disk)
        guest.run_vcpus()
        return vm

    async def adopt(self, vm_id: str, directory: Path) -> FakeVm | None:
        """Take over a VM that lives in the host."""
        vm = self.host.vms.get(vm_id)
        if vm is not None:
            await vm.link.cut("another server took over")
            vm.relink()
        return vm

    def list_leftovers(self) -> Sequence[str]:
        """Return the ids of all VMs in the host."""
        return list(self.host.vms)

    async def kept_ready(self) -> KeptReady:
        """Nothing is kept ready."""
        return KeptReady()

    async def close(self) -> None:
        """There is nothing to let go of."""
