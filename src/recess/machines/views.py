"""What users see of stored snapshots: lists, the tree with bytes owned and shared, whether one can be restored here.

Reads only. A damaged row or manifest is shown as damaged, never a reason not to show the others.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recess.catalog.snapshots import SnapshotRecord
from recess.db import Row, Tx
from recess.errors import RecessError
from recess.machines.keeping import SnapshotKeeping
from recess.machines.parts import Parts
from recess.machines.records import snapshot_row
from recess.machines.templates import fingerprint_json, manifest_vm, vm_from_json
from recess.snapshots import can_restore
from recess.snapshots.lineage import dependents, shares, tree_parents


class SnapshotViews:
    """Snapshots of a node as plain JSON data."""

    def __init__(self, parts: Parts, keeping: SnapshotKeeping) -> None:
        self._parts = parts
        self._keeping = keeping

    async def list_all(self) -> list[dict[str, Any]]:
        """Return every snapshot, newest first, with its names and what keeps it from being restored here."""
        catalog = self._parts.catalog
        records, names = await catalog.snapshots.readable(), await catalog.snapshots.names()
        reasons = await self.obstacles([one.id for one in records])
        found = [_row(one, names, reasons[one.id]) for one in records]
        readable = {one.id for one in records}
        for ref in sorted(set(await catalog.snapshots.all_ids()) - readable):
            found.append(_damaged(ref, names))
        return found

    async def inspect(self, ref: str) -> dict[str, Any]:
        """Return one snapshot with all that is known: names, bytes, who needs it, whether it can be restored here,
        and the driver it was taken under, with why its machine had that.

        Raises NotFound, BadInput, Corrupt (its row).
        """
        record = await self._parts.catalog.snapshots.get(ref)
        names = await self._parts.catalog.snapshots.names()
        reasons = await self.obstacles([record.id])
        out = _row(record, names, reasons[record.id]) | await asyncio.to_thread(self._driver_of, record.id)
        nodes: list[dict[str, Any]] = (await self.tree())["nodes"]
        node = next((one for one in nodes if one["id"] == record.id), {})
        for key in ("stored", "owned", "shared", "frees", "branch_frees", "needed_by", "dependents"):
            out[key] = node.get(key)
        return out

    def _driver_of(self, ref: str) -> dict[str, str]:
        """Return what a manifest says of the driver; "" where it says nothing or cannot be read. Blocks."""
        try:
            manifest = self._parts.store.manifest(ref)
        except RecessError:
            manifest = {}
        where = {"driver": ("fingerprint", "driver"), "driver_why": ("spec", "driver_why")}
        return {key: str(dict(manifest.get(part) or {}).get(name, "")) for key, (part, name) in where.items()}

    async def tree(self) -> dict[str, Any]:
        """Return all snapshots and templates as nodes with parents and bytes; see `recess.snapshots.lineage.Share`.

        `needed_by`: who would not come back without it; `dependents`: snapshots that share what it has written.
        """
        catalog = self._parts.catalog
        records = {one.id: one for one in await catalog.snapshots.readable()}
        names, holds = await catalog.snapshots.names(), await self._keeping.holds()
        ids = await catalog.snapshots.all_ids()
        templates, machines = await catalog.db.read(_others)
        newest = {str(one["snapshot"]): f"machine {one['name'] or one['id']}" for one in machines.values()}
        shapes = await asyncio.to_thread(self._parts.store.shapes, [*ids, *templates])
        parents = tree_parents(shapes, {one.id: one.parent for one in records.values()})
        bytes_of = shares(shapes, parents)
        nodes = []
        for ref in [*templates, *(one for one in ids if one not in templates)]:
            record, needed = records.get(ref), [n.get(ref) for n in (newest, holds.current, holds.logged)]
            node: dict[str, Any] = {
                "id": ref, "kind": "template" if ref in templates else "snapshot", "names": names.get(ref, []),
                "parent": parents.get(ref, ""), "damaged": ref not in shapes or (not record and ref not in templates),
                "needed_by": [one for one in needed if one],
            }  # fmt: skip
            if ref in templates:
                node |= {"image": templates[ref]["image"], "created": templates[ref]["created"], "machine_name": ""}
            elif record is not None:
                holder = machines.get(record.machine)
                node |= {
                    "machine": record.machine, "machine_name": holder["name"] if holder else "", "why": record.why,
                    "session": record.session, "created": record.created, "expires": record.expires,
                    "log_position": record.log_position,
                }  # fmt: skip
            if ref in shapes:
                node |= asdict(bytes_of[ref]) | {"dependents": dependents(ref, shapes)}
            nodes.append(node)
        return {"nodes": nodes, "bytes": await asyncio.to_thread(self._parts.store.used_bytes)}

    async def obstacles(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """Return for each snapshot why it cannot be restored on this node; [] means: it can.

        Manifest, template, image files and fingerprint are looked at; blobs are not read (that is `verify`).
        """
        known: dict[tuple[str, str], list[str] | Mapping[str, Any]] = {}
        out = {}
        for ref in ids:
            try:
                manifest = await asyncio.to_thread(self._parts.store.manifest, ref)
            except RecessError as exc:
                out[ref] = [exc.message]
                continue
            template, vm = str(manifest.get("template", "")), json.dumps(_shape(manifest))
            if (template, vm) not in known:
                known[template, vm] = await self._node_for(template, manifest)
            here = known[template, vm]
            out[ref] = here if isinstance(here, list) else can_restore(manifest.get("fingerprint", {}), here)
        return out

    async def _node_for(self, template: str, manifest: Mapping[str, Any]) -> list[str] | Mapping[str, Any]:
        """Return this node's fingerprint for machines like a manifest's, or why there can be none."""
        try:
            if template:
                await asyncio.to_thread(self._parts.store.manifest, template)
            vm = manifest_vm(manifest)
            boot = await self._parts.images.boot_files_by_hash(str(vm["root"]), str(vm["kernel"]), str(vm["initrd"]))
            spec = vm_from_json(vm, boot)
            return fingerprint_json(await self._parts.driver_of(spec.driver).fingerprint(spec))
        except KeyError as exc:
            return [f"its manifest lacks {exc}"]
        except RecessError as exc:
            return [f"what it stands on is not here: {exc.message}"]


def _shape(manifest: Mapping[str, Any]) -> object:
    try:
        return manifest_vm(manifest)
    except RecessError:
        return None


def _others(tx: Tx) -> tuple[dict[str, Row], dict[str, Row]]:
    """Return templates by manifest and machines by id, as they lie there: other columns may be damaged."""
    templates = tx.execute("SELECT manifest, image, created FROM catalog_template")
    machines = tx.execute("SELECT id, name, snapshot FROM catalog_machine")
    return {str(row["manifest"]): row for row in templates}, {str(row["id"]): row for row in machines}


def _row(record: SnapshotRecord, names: Mapping[str, Sequence[str]], reasons: list[str]) -> dict[str, Any]:
    return {
        **asdict(snapshot_row(record)), "names": list(names.get(record.id, [])), "expires": record.expires,
        "restorable": not reasons, "reasons": reasons, "damaged": False,
    }  # fmt: skip


def _damaged(ref: str, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    own = list(names.get(ref, []))
    return {
        "id": ref, "name": own[0] if own else "", "names": own, "machine": "", "why": "", "log_position": 0,
        "created": 0.0, "expires": 0.0, "figures": {}, "restorable": False, "reasons": ["its row cannot be read"],
        "damaged": True,
    }  # fmt: skip
