"""Which root images are needed on this node: what must be known before one is removed. Doubt keeps.

A root is needed by the templates that were booted from it, by machines that may be booted from it again, and by
snapshots of machines that stand on no template.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from recess.errors import HasDependents
from recess.machines.parts import Parts
from recess.machines.states import CREATED


def roots_of(descriptions: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the roots that rows' notes or manifests' specs name in their part `vm`."""
    vms = (one.get("vm") for one in descriptions)
    return {str(vm.get("root")) for vm in vms if isinstance(vm, Mapping) and vm.get("root")}


async def roots_in_use(parts: Parts) -> set[str]:
    """Return the hashes of all roots that something on this node needs.

    Raises Corrupt or NotFound when a row or a manifest cannot be read: what it needs is unknown.
    """
    templates, damaged = await parts.catalog.templates.survey()
    machines, more = await parts.catalog.machines.survey()
    snapshots, most = await parts.catalog.snapshots.survey()
    for row in (*damaged, *more, *most):
        raise row.error
    bare = [one.id for one in snapshots if not one.template]
    manifests = [await asyncio.to_thread(parts.store.manifest, snapshot_id) for snapshot_id in bare]
    specs = [spec for manifest in manifests if isinstance(spec := manifest.get("spec"), Mapping)]
    return roots_of([*(one.meta for one in templates), *(one.meta for one in machines), *specs])


async def release_root(parts: Parts, name: str, root: str) -> None:
    """Give up what this node keeps of an image for speed alone, before its name goes and, where `root` is told, its root:
    templates that nothing stands on, which the next run would boot again.

    Raises HasDependents when a machine was created from the image and never started: it is found by name.
    """
    machines, damaged = await parts.catalog.machines.survey()
    for row in damaged:
        raise row.error
    waiting = [one.name for one in machines if one.state == CREATED and one.spec.get("image") == name]
    if waiting:
        raise HasDependents(
            f"machine {waiting[0]} was created from image {name!r} and not started yet",
            hint="start or remove it first", ref=name,
        )  # fmt: skip
    if root:
        await parts.catalog.templates.forget_unused(root)
