"""A driver written from `docs/internals/driver-contract.md` alone, as small as one can be: whole captures, no template pages
shared, no disk of its own. It proves that the document and the suite are enough for a stranger, and that the suite asks for
no more than what is claimed.

What a hypervisor would be is `FakeGuest`; everything about being a driver is here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from recess.drivers.fake.guest import FakeGuest
from recess.drivers.fake.link import FakeLink
from recess.drivers.fake.programs import standard_programs
from recess.errors import Corrupt, DriverFailed, IllegalState, InvalidSpec, Unsupported
from recess.machines.contract import (
    DISK_NAME,
    Capabilities,
    Capture,
    Driver,
    Fingerprint,
    Hook,
    KeptReady,
    PageSet,
    RestoreParts,
    TemplateRef,
    Vm,
    VmSpec,
    VmStats,
)
from recess.testing.driver_suite import NO_PAGES, DriverSuite, Rig, new_thaw
from recess.units import PAGE_BYTES
from tests.conformance.test_driver_fake import SPEC

PROGRAMS = standard_programs()
MARK = b"toy-1"


class ToyVm:
    """One machine. Its memory is its state as a blob, from page 0 on, the blob's length before it."""

    def __init__(self, driver: ToyDriver, vm_id: str, spec: VmSpec, guest: FakeGuest, directory: Path) -> None:
        self.id, self.spec, self.guest, self.directory = vm_id, spec, guest, directory
        self.link: FakeLink = FakeLink(guest)
        self._driver = driver
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._deadline: asyncio.TimerHandle | None = None
        driver.running[vm_id] = self
        guest.run_vcpus()

    def _alive(self) -> None:
        if self._dead.done():
            raise DriverFailed(f"{self.id} is gone: {self._dead.result()}")

    async def pause(self) -> None:
        self._alive()
        self.guest.stop_vcpus()

    async def unpause(self) -> None:
        self._alive()
        self.guest.run_vcpus()

    async def capture(
        self, *, resume: bool, before_pause: Hook | None = None, after_resume: Hook | None = None, parent: str = "",
        disk_too: bool = False,
    ) -> Capture:  # fmt: skip
        self._alive()
        ran = self.guest.vcpus.is_set()
        if before_pause is not None:
            await before_pause()
        began = time.perf_counter()
        self.guest.stop_vcpus()
        pages = self._pages()
        if resume and ran:
            self.guest.run_vcpus()
        stood_s = time.perf_counter() - began
        if resume and ran and after_resume is not None:
            await after_resume()
        return Capture(
            memory=pages, disk=NO_PAGES, vmstate=MARK, base="boot", fingerprint=self._driver.mark,
            standstill_s=stood_s if resume else 0.0, memory_pages_total=self.spec.memory_bytes // PAGE_BYTES,
            disk_blocks_total=self.spec.disk_bytes // PAGE_BYTES,
        )  # fmt: skip

    def _pages(self) -> PageSet:
        blob = msgspec.msgpack.encode(
            (msgspec.msgpack.encode(self.guest.memory), msgspec.msgpack.encode(self.guest.disk))
        )
        data = len(blob).to_bytes(8, "little") + blob
        count = -(-len(data) // PAGE_BYTES)
        numbers = np.arange(count, dtype="<u4").tobytes()
        return PageSet(memoryview(numbers), memoryview(data.ljust(count * PAGE_BYTES, b"\0")))

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Nothing is tracked."""

    def about_memory(self) -> Mapping[str, str]:
        return {"tracking": "none", "tracking_why": "a toy takes everything"}

    async def export_template(self, directory: Path) -> TemplateRef:
        if self.id not in self._driver.for_templates:
            raise IllegalState(f"{self.id} was not booted to become a template")
        directory.mkdir(parents=True, exist_ok=True)
        ref = TemplateRef(self.id, directory / "ram", directory / "disk", directory / "vmstate")
        self.guest.stop_vcpus()
        ref.ram.write_bytes(self._pages().data)
        ref.disk.write_bytes(b"")
        ref.vmstate.write_bytes(MARK)
        await self.kill()
        return ref

    async def kill(self) -> None:
        await self._end("killed")
        (self.directory / DISK_NAME).unlink(missing_ok=True)

    async def _end(self, why: str) -> None:
        if not self._dead.done():
            self._dead.set_result(why)
            self._driver.running.pop(self.id, None)
            self.guest.stop_vcpus()
            await self.set_deadline(None)
            await self.link.cut(f"the machine is gone: {why}")
            await self.guest.stop()

    async def detach(self) -> None:
        await self.link.cut("this server let go of it")

    async def stalled(self) -> str:
        return ""

    async def wait_stalled(self) -> str:
        raise DriverFailed(f"{self.id} is gone: {await self.wait_dead()}")

    async def go_on(self) -> None:
        """Nothing is ever pending."""

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._dead)

    async def set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(
                seconds, lambda: self._driver.tasks.append(loop.create_task(self._expire()))
            )

    async def _expire(self) -> None:
        self._deadline = None
        await self._end("its deadline has passed")

    def console_tail(self, limit: int = 65536) -> bytes:
        return b"toy: up\n"[-limit:]

    async def stats(self) -> VmStats:
        self._alive()
        size = self._pages().data.nbytes
        return VmStats(pss_bytes=size, cpu_s=0.0, private_bytes=size)


@dataclass
class ToyDriver:
    """Its machines outlive it as the processes of a real one would: `running` is shared by drivers of one host."""

    running: dict[str, ToyVm] = field(default_factory=dict)
    for_templates: set[str] = field(default_factory=set)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    name: str = "toy"
    capabilities: Capabilities = Capabilities(  # noqa: RUF009 (frozen)
        snapshot=True, fork=True, live_snapshot=True, own_kernel=False, own_disk=False, isolation="none"
    )
    mark: Fingerprint = Fingerprint("toy", "1", "none", "toy", (), "toy", "")  # noqa: RUF009 (frozen)

    async def probe(self, *, fresh: bool = False) -> Mapping[str, Any]:
        return {"driver": self.name, "accelerator": "none"}

    async def fingerprint(self, spec: VmSpec) -> Fingerprint:
        return self.mark

    def check(self, spec: VmSpec) -> None:
        if spec.network == "full":
            raise Unsupported("a toy has no network cards")

    async def boot(self, vm_id: str, spec: VmSpec, directory: Path, *, for_template: bool = False) -> ToyVm:
        self.check(spec)
        disk = directory / DISK_NAME
        if not disk.is_file() or disk.stat().st_size != spec.disk_bytes:
            raise InvalidSpec(f"there is no disk of {spec.disk_bytes} bytes")
        if for_template:
            self.for_templates.add(vm_id)
        return ToyVm(self, vm_id, spec, FakeGuest.booted(PROGRAMS), directory)

    async def restore(self, vm_id: str, spec: VmSpec, parts: RestoreParts, directory: Path) -> ToyVm:
        self.check(spec)
        if parts.vmstate != MARK:
            raise Corrupt("not the device state of a toy")
        data = bytes(parts.memory.data)
        if not parts.memory.count and parts.template is not None:
            data = parts.template.ram.read_bytes()
        memory, disk = msgspec.msgpack.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / DISK_NAME).open("wb") as file:
            file.truncate(spec.disk_bytes)
        return ToyVm(self, vm_id, spec, FakeGuest.thawable(PROGRAMS, memory, disk), directory)

    async def adopt(self, vm_id: str, directory: Path) -> ToyVm | None:
        vm = self.running.get(vm_id)
        if vm is not None:
            vm.link = FakeLink(vm.guest)
        return vm

    def list_leftovers(self) -> Sequence[str]:
        return list(self.running)

    async def kept_ready(self) -> KeptReady:
        return KeptReady()

    async def close(self) -> None:
        """There is nothing but machines."""


@dataclass
class ToyRig(Rig):
    host: dict[str, ToyVm] = field(default_factory=dict)

    def make_driver(self) -> Driver:
        return ToyDriver(running=self.host)

    async def template(self) -> TemplateRef:
        directory = self.home / "template-vm"
        directory.mkdir(exist_ok=True)
        self.make_disk(directory)
        vm = await ToyDriver().boot("tpl", self.spec, directory, for_template=True)
        await vm.link.thaw(new_thaw())
        await vm.link.freeze(sync=True)
        return await vm.export_template(self.home / "template")

    def make_disk(self, directory: Path) -> None:
        with (directory / DISK_NAME).open("wb") as disk:
            disk.truncate(self.spec.disk_bytes)

    async def lose(self, vm: Vm) -> None:
        await vm.detach()

    def leftovers(self) -> list[str]:
        return [*self.host, *map(str, self.home.glob(f"machines/*/{DISK_NAME}"))]


class TestToyDriver(DriverSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Rig:
        return ToyRig(home=tmp_path, spec=SPEC)
