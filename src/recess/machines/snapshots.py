"""Stored snapshots by name: find, list, open for a restore, verify. The store holds bytes, the catalog names.

What becomes of them after that, names, retention, removal, is the business of `recess.machines.keeping`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from recess.errors import Incompatible, MissingTool, NotFound, Timeout, Unavailable, Unsupported
from recess.machines.contract import Driver, LazyMemory, MappedMemory, PageSet, RestoreParts
from recess.machines.mapped import DISK, MEMORY, to_pages
from recess.machines.parts import NO_PAGES, Parts
from recess.machines.records import damaged_snapshot, manifest_machine, snapshot_row
from recess.machines.service import MachineSpec, SnapshotRow
from recess.machines.starting import Origin
from recess.machines.templates import Template, Templates, fingerprint_json, manifest_vm
from recess.paging.choice import INJECT, LAZY, REMAP, Choice, Facts, choose
from recess.snapshots.compat import can_restore
from recess.units import PAGE_BYTES


class StoredSnapshots:
    """The snapshots of a node."""

    def __init__(self, parts: Parts, templates: Templates) -> None:
        self._parts = parts
        self._templates = templates

    async def list_all(self) -> list[SnapshotRow]:
        """Return all, newest first, and before them any whose row is damaged (`why` is "damaged")."""
        records, damaged = await self._parts.catalog.snapshots.survey()
        return [*map(damaged_snapshot, damaged), *map(snapshot_row, records)]

    async def get(self, ref: str) -> SnapshotRow:
        """Return by id, name or unambiguous id prefix; in a shared store also one of another home. Raises NotFound."""
        try:
            return snapshot_row(await self._parts.catalog.snapshots.get(ref))
        except NotFound:
            if self._parts.find_elsewhere is None:
                raise
            return snapshot_row(await self._parts.find_elsewhere(ref))

    async def open(
        self, snapshot_id: str, *, early: bool = False, many: bool = False, stored: bool = False
    ) -> tuple[Origin, MachineSpec, Mapping[str, Any]]:
        """Return what a restore needs: origin, machine spec, manifest. Raises Corrupt, NotFound, Incompatible.

        With `early`, and a driver that can begin meanwhile, the pages are still being read when this returns. `many`: the
        origin is for several machines. `stored`: every page comes from the store, whatever is at hand.
        """
        began = time.monotonic()
        template, manifest = await self.stands_on(snapshot_id)
        machine = manifest_machine(manifest, snapshot_id)
        driver, reasons = await self._can_restore(template, manifest)
        if reasons:
            raise Incompatible(
                f"snapshot {snapshot_id[:16]} cannot be restored here: {reasons[0]}",
                hint="restore it where it was taken; a session goes on from its log", reasons=reasons,
            )  # fmt: skip
        afar = await asyncio.to_thread(self._parts.store.fetch_bytes, snapshot_id)
        rest = asyncio.ensure_future(self._read(snapshot_id, template, manifest, many=many, stored=stored))
        rest.add_done_callback(_look_at)  # a restore that fails before it needs the pages never awaits them
        coming = RestoreParts(template.ref, NO_PAGES, NO_PAGES, b"", snapshot_id, rest)
        origin = Origin(
            template, coming, snapshot_id, timings_s={"manifest": time.monotonic() - began}, fetched_bytes=afar
        )
        if driver is None or not (early and driver.capabilities.early_start):
            origin = await origin.settled()
        return origin, machine, manifest

    async def stands_on(self, snapshot_id: str) -> tuple[Template, Mapping[str, Any]]:
        """Return the template that a snapshot's gaps mean, ready on this node, and its manifest. Raises as `open` does."""
        manifest = await asyncio.to_thread(self._parts.store.manifest, snapshot_id)
        manifest_machine(manifest, snapshot_id)  # is it one of a machine at all?
        spec = manifest["spec"]
        return await self._templates.under(str(spec.get("template", "")), manifest_vm(manifest)), manifest

    async def _can_restore(self, template: Template, manifest: Mapping[str, Any]) -> tuple[Driver | None, list[str]]:
        """Return the driver that a snapshot needs, and what keeps it from being restored by it; None: it is not here."""
        name = template.spec.driver
        try:
            driver = self._parts.driver_of(name)
            here = fingerprint_json(await driver.fingerprint(template.spec))
        except (Unsupported, MissingTool) as exc:
            if name == self._parts.driver.name:
                raise  # this node's own tools can be put back; a driver that it does not run on may never come
            return None, [f"it was taken under the driver {name}: {exc.message}"]
        return driver, can_restore(manifest.get("fingerprint", {}), here)

    async def _read(
        self, snapshot_id: str, template: Template, manifest: Mapping[str, Any], *, many: bool, stored: bool
    ) -> RestoreParts:
        began = time.monotonic()
        store = self._parts.store
        mapped = None if stored else await self._at_hand(snapshot_id, template)
        choice = self._choose(template, manifest, at_hand=mapped is not None, many=many or stored)
        if choice.way != REMAP:
            mapped = None

        async def overlay(part: str) -> PageSet:
            # Where the memory is not read whole, nothing is: its layers hold the disk's blocks, too.
            sparing = part == DISK and choice.way != INJECT
            work = asyncio.to_thread(
                store.overlay, snapshot_id, part, template=template.pages, sources=template.sources, sparing=sparing
            )
            return to_pages(await work)

        async def memory() -> tuple[PageSet, LazyMemory | None, Choice]:
            make = self._parts.make_pager
            if choice.way == REMAP:
                return NO_PAGES, None, choice
            if choice.way == LAZY and make is not None and template.ref is not None:
                boot = template.spec.boot
                files = {boot.root_hash: boot.root, boot.kernel_hash: boot.kernel}
                try:
                    pager = await make(snapshot_id, MEMORY, template.ref.ram, files, partial(overlay, MEMORY))
                    return NO_PAGES, pager, choice
                except (Unavailable, Timeout) as exc:
                    return await overlay(MEMORY), None, Choice(INJECT, exc.message)
            pages = await overlay(MEMORY)
            if self._may_map(template) and self._parts.at_hand is not None and not stored:
                total = template.spec.memory_bytes // PAGE_BYTES
                self._parts.at_hand.keep_pages(snapshot_id, template.ref, pages, total)
            return pages, None, choice

        (pages, lazy, how), disk, vmstate = await asyncio.gather(
            memory(), overlay(DISK), asyncio.to_thread(store.vmstate, snapshot_id)
        )
        return RestoreParts(
            template.ref, pages, disk, vmstate, snapshot_id,
            read_s=time.monotonic() - began, lazy=lazy, choice=f"{how.way}: {how.why}", mapped=mapped,
        )  # fmt: skip

    def _may_map(self, template: Template) -> bool:
        can = self._parts.driver_of(template.spec.driver).capabilities
        return can.mapped_memory and self._parts.lazy_memory in ("auto", REMAP)

    async def _at_hand(self, snapshot_id: str, template: Template) -> MappedMemory | None:
        at_hand, ref = self._parts.at_hand, template.ref
        if at_hand is None or ref is None or not self._may_map(template):
            return None
        return await asyncio.to_thread(at_hand.find, snapshot_id, ref)

    def _choose(self, template: Template, manifest: Mapping[str, Any], *, at_hand: bool, many: bool) -> Choice:
        memory = manifest["parts"].get(MEMORY, {})
        facts = Facts(
            pages=sum(int(memory.get(kind, 0)) for kind in ("zero", "block", "layer")),
            over_template=template.ref is not None,
            driver_can=self._parts.driver_of(template.spec.driver).capabilities.lazy_memory,
            pager_there=self._parts.make_pager is not None,
            wanted=self._parts.lazy_memory,
            driver_maps=self._parts.driver_of(template.spec.driver).capabilities.mapped_memory,
            at_hand=at_hand,
            many=many,
        )
        return choose(facts)

    async def verify(self, ref: str) -> Mapping[str, Any]:
        """Re-hash everything a snapshot and its template consist of. Raises Corrupt naming the blob."""
        row = await self.get(ref)
        out = dict(await asyncio.to_thread(self._parts.store.verify, row.id))
        if row.template:
            out["template"] = dict(await asyncio.to_thread(self._parts.store.verify, row.template))
        return out


def _look_at(reading: asyncio.Future[RestoreParts]) -> None:
    if not reading.cancelled():
        reading.exception()
