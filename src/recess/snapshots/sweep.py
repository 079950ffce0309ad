"""Garbage collection: mark from manifests, sweep what is old and unmarked. Never by reference counts.

Roots: the live ids, and every manifest younger than the grace period (its row may not be written yet, or the list of
live ids may be older than it). A root keeps its files and its template, which is a root in turn.

Crash-safe in any place: manifests go first and durably, files after; so what a crash leaves is at worst a file without
a manifest, never a manifest without its files. A root that cannot be read stops everything before the first deletion:
what it needs is unknown. Writes that run meanwhile are protected by `publish.Pins` and by the grace period.

`discard` is the same for one snapshot that nobody wants any more, at once instead of after the grace period.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from recess.blobs import BlobInfo, BlobStore
from recess.crashpoints import crash_point
from recess.errors import Corrupt, HasDependents, Incompatible, NotFound
from recess.snapshots.keys import FOLDERS, SNAPSHOT, id_of, is_id, key_of, keys_of
from recess.snapshots.publish import Pins
from recess.snapshots.reader import read_manifest


def mark(blobs: BlobStore, roots: Iterable[str], wanted: Iterable[str] = ()) -> set[str]:
    """Return the keys of everything the roots need, and those of `wanted` that are there.

    Raises NotFound (a root is not there), Corrupt, Incompatible, BadInput.
    """
    marked: set[str] = set()
    needed = set(roots)
    wishes = {ref for ref in wanted if is_id(ref, SNAPSHOT)} - needed  # what is no id cannot be there
    waiting = [*wishes, *needed]
    while waiting:
        snapshot_id = waiting.pop()
        key = key_of(snapshot_id)
        if key in marked:
            continue
        try:
            manifest = read_manifest(blobs, snapshot_id)
        except NotFound:
            if snapshot_id in wishes:
                continue
            raise
        marked.add(key)
        marked.update(key for ref in manifest.files() for key in keys_of(ref))
        if manifest.template:
            waiting.append(manifest.template)
    return marked


def collect(
    blobs: BlobStore, pins: Pins, live_ids: Iterable[str], *, grace_s: float, now: float, wanted: Iterable[str] = ()
) -> dict[str, int]:
    """Sweep; return how many manifests, files and leftovers of interrupted puts went, and how many bytes."""
    before = now - grace_s
    counts = {"manifests": 0, "files": 0, "leftovers": 0, "bytes": 0}
    with pins.sweep():
        infos = [info for folder in FOLDERS for info in blobs.list_blobs(folder) if id_of(info.key) is not None]
        manifests = [info for info in infos if _is_manifest(info)]
        young = [str(id_of(info.key)) for info in manifests if info.modified_s >= before]
        marked = mark(blobs, [*live_ids, *young], wanted)
        files = [info for info in infos if not _is_manifest(info)]
        for kind, group in (("manifests", manifests), ("files", files)):
            for info in group:
                if info.key not in marked and info.modified_s < before and _delete(blobs, pins, info.key, before):
                    counts[kind] += 1
                    counts["bytes"] += info.size_bytes
                    crash_point("collect.between_deletions")
    counts["leftovers"] = blobs.clean(before_s=before)
    return counts


def discard(blobs: BlobStore, pins: Pins, snapshot_id: str) -> dict[str, int]:
    """Delete one snapshot now, and those of its files that no other manifest names, with a row or without.

    Only where this process is the only writer of the store: what a running write here uses is pinned, but a write of
    another process would need the grace period of `collect`. Not there: nothing happens. Raises HasDependents (it is
    somebody's template), Corrupt (a manifest is unreadable, so what it needs is unknown: nothing was deleted).
    """
    own, counts = key_of(snapshot_id), {"manifests": 0, "files": 0, "bytes": 0}
    with pins.sweep():
        files: list[str] = []  # if it is damaged: what was its alone is found by the next sweep
        try:
            own_bytes = blobs.stat(own).size_bytes
            files = read_manifest(blobs, snapshot_id).files()
        except NotFound:
            return counts
        except (Corrupt, Incompatible):
            pass
        ids = (id_of(info.key) for info in blobs.list_blobs(FOLDERS[0]))
        marked = mark(blobs, (), [ref for ref in ids if ref is not None and ref != snapshot_id])
        if own in marked:
            raise HasDependents(f"snapshot {snapshot_id[:16]} is a template in use", dependents=[])
        sizes = {}
        for key in (key for ref in files for key in keys_of(ref) if key not in marked):
            with suppress(NotFound):  # the other form of a layer; or another process deletes the same
                sizes[key] = blobs.stat(key).size_bytes
        if not pins.delete(blobs, own):
            return counts
        counts["manifests"], counts["bytes"] = 1, own_bytes
        for key, size in sizes.items():
            crash_point("discard.between_deletions")
            if pins.delete(blobs, key):
                counts["files"] += 1
                counts["bytes"] += size
    return counts


def _is_manifest(info: BlobInfo) -> bool:
    return str(id_of(info.key)).startswith(f"{SNAPSHOT}_")


def _delete(blobs: BlobStore, pins: Pins, key: str, before: float) -> bool:
    """Delete unless a writer, here or on another node, has found a use for it since it was listed."""
    try:
        return blobs.stat(key).modified_s < before and pins.delete(blobs, key)
    except NotFound:
        return False
