"""Stored snapshots by name: find, list, open for a restore, verify, remove. The store holds bytes, the catalog names.

Deleting refuses while something stands on a snapshot, and says what; the bytes go later, by mark and sweep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from recess.errors import Corrupt, HasDependents, Incompatible, NotFound
from recess.machines.contract import RestoreParts
from recess.machines.mapped import DISK, MEMORY, to_pages
from recess.machines.parts import Parts
from recess.machines.records import snapshot_row, spec_from_json
from recess.machines.service import MachineSpec, SnapshotRow
from recess.machines.starting import Origin
from recess.machines.states import SUSPENDED
from recess.machines.templates import Templates, fingerprint_json
from recess.snapshots.compat import can_restore

COLLECT_GRACE_S = 600.0


class StoredSnapshots:
    """The snapshots of a node."""

    def __init__(self, parts: Parts, templates: Templates) -> None:
        self._parts = parts
        self._templates = templates

    async def list_all(self) -> list[SnapshotRow]:
        """Return all, newest first."""
        return [snapshot_row(r) for r in await self._parts.catalog.snapshots.list_all()]

    async def get(self, ref: str) -> SnapshotRow:
        """Return by id, name or unambiguous id prefix. Raises NotFound."""
        return snapshot_row(await self._parts.catalog.snapshots.get(ref))

    async def open(self, snapshot_id: str) -> tuple[Origin, MachineSpec, Mapping[str, Any]]:
        """Return what a restore needs: origin, machine spec, manifest. Raises Corrupt, NotFound, Incompatible."""
        began = time.monotonic()
        manifest = await asyncio.to_thread(self._parts.store.manifest, snapshot_id)
        spec = manifest.get("spec")
        if not isinstance(spec, Mapping) or not isinstance(spec.get("machine"), Mapping):
            raise Corrupt(f"snapshot {snapshot_id[:16]}: its manifest holds no machine spec")
        template = await self._templates.by_id(str(spec.get("template", "")))
        here = fingerprint_json(await self._parts.driver.fingerprint(template.spec))
        reasons = can_restore(manifest.get("fingerprint", {}), here)
        if reasons:
            raise Incompatible(
                f"snapshot {snapshot_id[:16]} cannot be restored here: {reasons[0]}",
                hint="restore it where it was taken; a session goes on from its log", reasons=reasons,
            )  # fmt: skip
        opened = time.monotonic()
        store = self._parts.store
        memory, disk, vmstate = await asyncio.gather(
            asyncio.to_thread(store.overlay, snapshot_id, MEMORY, template=template.pages, sources=template.sources),
            asyncio.to_thread(store.overlay, snapshot_id, DISK, template=template.pages, sources=template.sources),
            asyncio.to_thread(store.vmstate, snapshot_id),
        )
        parts = RestoreParts(template.ref, to_pages(memory), to_pages(disk), vmstate)
        timings = {"manifest": opened - began, "read": time.monotonic() - opened}
        origin = Origin(template, parts, snapshot_id, parts.memory.data.nbytes + parts.disk.data.nbytes, timings)
        return origin, spec_from_json(spec["machine"], f"snapshot {snapshot_id[:16]}"), manifest

    async def verify(self, ref: str) -> Mapping[str, Any]:
        """Re-hash everything a snapshot and its template consist of. Raises Corrupt naming the blob."""
        row = await self.get(ref)
        out = dict(await asyncio.to_thread(self._parts.store.verify, row.id))
        if row.template:
            out["template"] = dict(await asyncio.to_thread(self._parts.store.verify, row.template))
        return out

    async def remove(self, ref: str) -> None:
        """Forget a snapshot. Raises HasDependents when a suspended machine, or another snapshot, stands on it."""
        row = await self.get(ref)
        catalog = self._parts.catalog
        machines = await catalog.machines.list_in_states([SUSPENDED])
        dependents = [m.name for m in machines if m.snapshot == row.id]
        if not dependents:
            ids = [r.id for r in await catalog.snapshots.list_all() if r.id != row.id]
            try:
                dependents = await asyncio.to_thread(self._parts.store.dependents, row.id, ids)
            except NotFound:
                dependents = []  # its manifest is gone already: nothing can stand on it
        if dependents:
            shown = ", ".join(d[:20] for d in dependents[:5])
            raise HasDependents(
                f"snapshot {row.name or row.id[:16]} is needed by {shown}", hint="remove those first",
                dependents=dependents,
            )  # fmt: skip
        await catalog.snapshots.delete(row.id)

    async def collect(self, *, grace_s: float = COLLECT_GRACE_S) -> Mapping[str, int]:
        """Sweep blobs that no row's manifest reaches and that are older than the grace period."""
        catalog = self._parts.catalog
        live = [r.id for r in await catalog.snapshots.list_all()]
        live += [r.manifest for r in await catalog.templates.list_all()]
        now = self._parts.clock.wall_s()
        return await asyncio.to_thread(lambda: self._parts.store.collect(live, grace_s=grace_s, now=now))
