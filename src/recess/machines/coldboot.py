"""The fourth rung of the ladder: a cold boot from a disk, when the memory is gone. Files are kept.

A cold boot takes the machine's own read-only root (by hash; the image of that name as it is now, and says so, when that root is gone), today's kernel and guestd,
and a writable disk that lies in the machine's folder. Such a machine stands on no template: its next snapshot is whole.

Crash-safe: the disk that is booted is a second name of the kept one (`keptdisk`), or a fresh copy out of the store, and
the kept name goes only after the row says "running". A server that dies before leaves the row as it was, a stray VM
that the next one ends, and the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recess.catalog.machines import MachineRecord
from recess.catalog.once import Once
from recess.crashpoints import crash_point
from recess.errors import Corrupt, Incompatible, MissingTool, NotFound, Unsupported
from recess.machines import keptdisk
from recess.machines.contract import DISK_NAME, BootFiles, Driver, VmSpec
from recess.machines.fleet import Fleet
from recess.machines.launching import Launcher, child_spec
from recess.machines.mapped import DISK, MappedTemplate
from recess.machines.parts import UNDO, Parts
from recess.machines.records import manifest_machine, spec_from_json, vm_of, vm_spec
from recess.machines.service import Changes, MachineSpec, ResumeReport, SnapshotRow
from recess.machines.starting import cold_origin
from recess.machines.states import EXITED, next_state
from recess.machines.templates import Templates, bare_template, manifest_vm
from recess.snapshots.contract import PageSource, TemplatePages

COLD_RUNG = 4
COLD_WHY = "booted cold: files are kept, memory and processes are gone"
_TEMPLATE_DISK = "template.disk"


class ColdBoot:
    """Boots machines from disks. Calls that name a record expect its lock to be held, `own` and `snapshot` no VM."""

    def __init__(self, parts: Parts, fleet: Fleet, launcher: Launcher, templates: Templates) -> None:
        self._parts = parts
        self._fleet = fleet
        self._launcher = launcher
        self._templates = templates

    async def own(self, record: MachineRecord, *, epoch: int, why: str) -> tuple[MachineRecord, ResumeReport]:
        """Boot from the disk that its last VM left. Raises NotFound, Corrupt, Incompatible, Unavailable, OutOfSpace."""
        driver, moved = await self._driver(record.driver)
        spec = spec_from_json(record.spec, f"machine {record.id}")
        directory = self._parts.directory(record.id)
        if keptdisk.size_of(directory) != spec.disk_bytes:
            raise Corrupt(f"the disk of machine {record.name} has not the {spec.disk_bytes} bytes it should have")
        boot, note = await self._boot_files(spec, vm_of(record))
        keptdisk.lay(directory)
        ground = vm_spec(spec, boot, driver.name)
        booted, report = await self._boot(record, ground, epoch=epoch, why=_join(why, COLD_WHY, moved, note))
        # One that exited or was rebooted had settled; whatever else ended a VM left its page cache no time.
        return booted, replace(report, power_cut=record.state != EXITED)

    async def again(self, record: MachineRecord, row: SnapshotRow, *, epoch: int) -> tuple[MachineRecord, ResumeReport]:
        """Bring a suspended, exited or dead machine back from a snapshot's disk. Raises IllegalState, and as `own`."""
        next_state(record.state, "restore", f"machine {record.name}")
        await self._fleet.end(record.id, "it comes back from a snapshot", keep_disk=True)
        return await self.snapshot(record, row, epoch=epoch, why=record.status)

    async def new(
        self,
        row: SnapshotRow,
        *,
        name: str,
        session: str,
        epoch: int,
        changes: Changes | None = None,
        once: Once | None = None,
    ) -> tuple[MachineRecord, ResumeReport]:
        """Make a new machine from a snapshot's disk. Raises as `own`; then no row is left."""
        manifest = await asyncio.to_thread(self._parts.store.manifest, row.id)
        spec = child_spec(manifest_machine(manifest, row.id), changes)
        note = {"origin": {"snapshot": row.id, "machine": row.machine}}
        record = await self._launcher.claim(spec, name=name, session=session, meta=note, once=once)
        async with self._fleet.lock(record.id):
            try:
                return await self.snapshot(record, row, epoch=epoch, why="")
            except UNDO:
                await self._launcher.abandon(record)
                raise

    async def snapshot(
        self, record: MachineRecord, row: SnapshotRow, *, epoch: int, why: str
    ) -> tuple[MachineRecord, ResumeReport]:
        """Boot from the disk part of a snapshot; every frame of it is verified on the way. Raises as `own`."""
        spec = spec_from_json(record.spec, f"machine {record.id}")
        manifest = await asyncio.to_thread(self._parts.store.manifest, row.id)
        vm = manifest_vm(manifest)
        driver, moved = await self._driver(str(vm["driver"]))
        if vm.get("disk_bytes") != spec.disk_bytes:
            raise Incompatible(f"snapshot {row.id[:16]}: its disk has another size", reasons=["disk size"])
        boot, note = await self._boot_files(spec, vm)
        directory = self._parts.directory(record.id)
        directory.mkdir(parents=True, exist_ok=True)
        keptdisk.clear(directory)
        try:
            await self._unpack(row.id, str(manifest.get("template", "")), vm, directory)
        finally:
            (directory / _TEMPLATE_DISK).unlink(missing_ok=True)
        why = _join(why, f"the disk of snapshot {row.id[:16]}", COLD_WHY, moved, note)
        record, report = await self._boot(record, vm_spec(spec, boot, driver.name), epoch=epoch, why=why)
        return record, replace(report, snapshot=row.id, log_position=row.log_position)

    async def _driver(self, before: str) -> tuple[Driver, str]:
        """Return the driver to boot a disk with that a machine of the driver `before` left, and what is to be said of a
        change: any that has disks, and works here, can boot it. Raises Unsupported."""
        parts = self._parts
        known = {one.name: one for one in (parts.driver, *parts.others.values())}
        if before in known and not known[before].capabilities.own_disk:
            raise Unsupported(f"the {before} driver keeps files in memory: there is no disk to boot from")
        for driver in sorted(known.values(), key=lambda one: one.name != before):
            if driver.capabilities.own_disk and await self._is_here(driver):
                changed = driver.name != before
                return driver, f"under the driver {driver.name}, since {before} is not on this node" if changed else ""
        raise Unsupported(f"no driver of this node boots from a disk: it has {', '.join(known)}")

    async def _is_here(self, driver: Driver) -> bool:
        """Tell whether a driver's tools are on this node. Its own count as there: they can be put back, and a machine waits
        for that; those of another driver may never come."""
        if driver is self._parts.driver:
            return True
        try:
            await driver.probe()
        except (Unsupported, MissingTool):
            return False
        return True

    async def _unpack(self, snapshot_id: str, template_id: str, vm: Mapping[str, Any], directory: Path) -> None:
        """Write a snapshot's disk as a file. Its template's memory is not needed, and may be damaged."""
        store = self._parts.store
        sources = (await self._templates.under("", vm)).sources
        template: TemplatePages | None = None
        if template_id:
            template = await self._template_disk(template_id, sources, directory)
        await asyncio.to_thread(
            lambda: store.materialise(snapshot_id, DISK, directory / DISK_NAME, template=template, sources=sources)
        )

    async def _template_disk(self, template_id: str, sources: list[PageSource], directory: Path) -> TemplatePages:
        known = self._templates.loaded(template_id)
        if known is not None and known.pages is not None:
            return known.pages
        target = directory / _TEMPLATE_DISK
        await asyncio.to_thread(
            lambda: self._parts.store.materialise(template_id, DISK, target, template=None, sources=sources)
        )
        return MappedTemplate(template_id, {DISK: target})

    async def _boot_files(self, spec: MachineSpec, vm: Mapping[str, Any] | None) -> tuple[BootFiles, str]:
        """Return what to boot with, and what is to be said about it. Raises NotFound when no root is left."""
        try:
            now = await self._parts.images.boot_files(spec.image)
        except NotFound:
            if vm is None:
                raise
            return await self._templates.boot_files(vm), ""
        if vm is not None and vm.get("root") == now.root_hash:
            return now, ""
        if vm is not None:
            with contextlib.suppress(NotFound):
                todays = {**vm, "kernel": now.kernel_hash, "initrd": now.initrd_hash}
                old = await self._templates.boot_files(todays)
                return replace(now, root=old.root, root_hash=old.root_hash), ""
        return now, f"its root is the image {spec.image} as it is now"

    async def _boot(
        self, record: MachineRecord, spec: VmSpec, *, epoch: int, why: str
    ) -> tuple[MachineRecord, ResumeReport]:
        began = time.monotonic()
        crash_point("machines.before_cold_boot")
        try:
            ground = bare_template(spec, await self._parts.images.sources(spec.boot))
            record, _, timings = await self._launcher.launch(record, cold_origin(ground), epoch=epoch, status=why)
        except UNDO:
            keptdisk.clear(self._parts.directory(record.id))  # a failed boot leaves the caller's disk
            raise
        return record, ResumeReport(COLD_RUNG, why, time.monotonic() - began, timings_s=timings)


def _join(*words: str) -> str:
    return "; ".join(word for word in words if word)
