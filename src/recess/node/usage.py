"""What takes space on a node, by kind, as `docker system df` shows it: counts, bytes on the disk, bytes nobody needs.

Bytes are what the file system allots (sparse disks count what they hold). Blocking parts run off the loop.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recess.config import Config
from recess.machines.manager import Manager
from recess.machines.states import CREATED, DEAD, EXITED, WITH_VM
from recess.node.imageadmin import ImageAdmin

_BLOCK = 512  # of st_blocks, whatever the file system's own


@dataclass(frozen=True)
class Kind:
    """One line: how many there are, how many of them are in use, their bytes and those that could be given back."""

    kind: str
    count: int
    active: int
    bytes: int
    reclaimable_bytes: int


def allotted_bytes(folder: Path) -> int:
    """Return the bytes that the files below a folder hold; what goes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_blocks * _BLOCK
            except OSError:
                continue
    return total


async def usage(
    config: Config, machines: Manager, images: ImageAdmin, in_use: Collection[str],
    kept: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """Return the kinds, and what is free on the disk of the home. `kept`: what drivers keep started, by driver's name."""
    kinds = [
        await _machines(config, machines), await _snapshots(machines), await _images(images, in_use),
        await _templates(config, machines), *await asyncio.to_thread(caches, config), waiting(kept),
    ]  # fmt: skip
    free = await asyncio.to_thread(lambda: shutil.disk_usage(config.home).free)
    return {"kinds": [asdict(kind) for kind in kinds], "free_bytes": free}


def waiting(kept: Mapping[str, Mapping[str, int]]) -> Kind:
    """Return the line of the VMs that wait for the next restores: memory that is given back when it is needed."""
    held = sum(one["memory_bytes"] for one in kept.values())
    return Kind("waiting VMs (memory)", sum(one["waiting"] for one in kept.values()), 0, held, held)


def caches(config: Config) -> list[Kind]:
    """Return the lines of what is made again when it is needed, so that all of it could be given back (`prune --caches`)."""
    folders = [("page files", config.pages_dir, ".pages"), ("packed exports", config.packed_dir, "")]
    if config.store:
        folders.append(("copies of the store", config.copies_dir, ""))
    return [_cache(name, folder, ending) for name, folder, ending in folders]


def _cache(name: str, folder: Path, ending: str) -> Kind:
    held = allotted_bytes(folder)
    count = sum(file.endswith(ending) for _, _, files in os.walk(folder) for file in files)
    return Kind(name, count, 0, held, held)


async def _machines(config: Config, machines: Manager) -> Kind:
    rows = await machines.list_machines(everything=True)
    sizes = {row.id: await asyncio.to_thread(allotted_bytes, config.machines_dir / row.id) for row in rows}
    ended = [row for row in rows if row.state in (EXITED, DEAD, CREATED) and not row.session]
    active = sum(row.state in WITH_VM for row in rows)
    return Kind("machines", len(rows), active, sum(sizes.values()), sum(sizes[row.id] for row in ended))


async def _snapshots(machines: Manager) -> Kind:
    tree = await machines.views.tree()
    nodes = [node for node in tree["nodes"] if node["kind"] == "snapshot"]
    needed = [node for node in nodes if node["names"] or node["needed_by"] or node.get("dependents")]
    loose = sum(int(node.get("frees") or 0) for node in nodes if node not in needed)
    return Kind("snapshots", len(nodes), len(needed), int(tree["bytes"]), loose)


async def _images(images: ImageAdmin, in_use: Collection[str]) -> Kind:
    rows = await images.list_all()
    sizes = {row["root_hash"]: int(row["size_bytes"]) for row in rows}
    loose = sum(size for digest, size in sizes.items() if digest not in in_use)
    return Kind("images", len(rows), sum(row["root_hash"] in in_use for row in rows), sum(sizes.values()), loose)


async def _templates(config: Config, machines: Manager) -> Kind:
    """Their files, most often in memory: those that no machine runs on are rebuilt when they are needed (`prune --caches`)."""
    folder = config.run_dir / "templates"
    names = await asyncio.to_thread(lambda: [one.name for one in folder.iterdir()] if folder.is_dir() else [])
    sizes = {name: await asyncio.to_thread(allotted_bytes, folder / name) for name in names}
    used = {name for name in names if any(i.endswith(name) for i in machines.templates_in_use())}
    spare = sum(size for name, size in sizes.items() if name not in used)
    return Kind("templates", len(names), len(used), sum(sizes.values()), spare)
