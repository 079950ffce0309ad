"""Garbage collection: mark from manifests, sweep what is old and unmarked. Never by reference counts.

Roots: the live ids, and every manifest younger than the grace period (its row may not be written yet, or the list of
live ids may be older than it). A root keeps its files and its template, which is a root in turn.

Crash-safe in any place: manifests go first and durably, files after; so what a crash leaves is at worst a file without
a manifest, never a manifest without its files. A root that cannot be read stops everything before the first deletion:
what it needs is unknown. Writes that run meanwhile are protected by `publish.Pins` and by the grace period.
"""

from __future__ import annotations

from collections.abc import Iterable

from recess.blobs import BlobInfo, BlobStore
from recess.crashpoints import crash_point
from recess.errors import NotFound
from recess.snapshots.keys import FOLDERS, SNAPSHOT, id_of, key_of
from recess.snapshots.publish import Pins
from recess.snapshots.reader import read_manifest


def mark(blobs: BlobStore, roots: Iterable[str]) -> set[str]:
    """Return the keys of everything the roots need. Raises NotFound, Corrupt, Incompatible, BadInput."""
    marked: set[str] = set()
    waiting = list(roots)
    while waiting:
        snapshot_id = waiting.pop()
        key = key_of(snapshot_id)
        if key in marked:
            continue
        manifest = read_manifest(blobs, snapshot_id)
        marked.add(key)
        marked.update(key_of(ref) for ref in manifest.files())
        if manifest.template:
            waiting.append(manifest.template)
    return marked


def collect(blobs: BlobStore, pins: Pins, live_ids: Iterable[str], *, grace_s: float, now: float) -> dict[str, int]:
    """Sweep; return how many manifests, files and leftovers of interrupted puts went, and how many bytes."""
    before = now - grace_s
    counts = {"manifests": 0, "files": 0, "leftovers": 0, "bytes": 0}
    with pins.sweep():
        infos = [info for folder in FOLDERS for info in blobs.list_blobs(folder) if id_of(info.key) is not None]
        manifests = [info for info in infos if _is_manifest(info)]
        young = [str(id_of(info.key)) for info in manifests if info.modified_s >= before]
        marked = mark(blobs, [*live_ids, *young])
        files = [info for info in infos if not _is_manifest(info)]
        for kind, group in (("manifests", manifests), ("files", files)):
            for info in group:
                if info.key not in marked and info.modified_s < before and _delete(blobs, pins, info.key, before):
                    counts[kind] += 1
                    counts["bytes"] += info.size_bytes
                    crash_point("collect.between_deletions")
    counts["leftovers"] = blobs.clean(before_s=before)
    return counts


def _is_manifest(info: BlobInfo) -> bool:
    return str(id_of(info.key)).startswith(f"{SNAPSHOT}_")


def _delete(blobs: BlobStore, pins: Pins, key: str, before: float) -> bool:
    """Delete unless a writer, here or on another node, has found a use for it since it was listed."""
    try:
        return blobs.stat(key).modified_s < before and pins.delete(blobs, key)
    except NotFound:
        return False
