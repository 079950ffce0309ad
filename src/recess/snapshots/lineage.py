"""Who shares bytes with whom, and what deleting would free: arithmetic over what manifests say. Pure.

Nothing in the store is a chain: a snapshot names every file it needs, so deleting its parent never hurts it. What
"depends" means here is therefore said in `dependents`: a template is part of its snapshots' meaning, and a file that
only the deleted snapshot had written would stay for the others' sake. This module must know no names and no rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recess.snapshots.manifest_v1 import ManifestV1


@dataclass(frozen=True)
class Shape:
    """What one manifest says about bytes. `files`: stored size by id, the template's files not counted; `made`: those
    that were written with this snapshot; `manifest_bytes`: size of the manifest itself."""

    id: str
    parent: str
    template: str
    files: Mapping[str, int]
    made: frozenset[str]
    manifest_bytes: int = 0


@dataclass(frozen=True)
class Share:
    """Bytes of one snapshot. `stored`: all it refers to; `owned`: what nobody else refers to; `shared`: the rest.

    `frees`: what deleting it alone gives back (0 for a template in use). `branch_frees`: what deleting it with
    everything that descends from it gives back.
    """

    stored: int
    owned: int
    shared: int
    frees: int
    branch_frees: int


def shape_of(snapshot_id: str, manifest: ManifestV1, manifest_bytes: int, recoded: Mapping[str, int]) -> Shape:
    """Return a manifest's shape; `recoded`: the sizes of layers that were recompressed since."""
    files = {file.id: recoded.get(file.id, file.bytes) for file in (*manifest.layers, *manifest.pagemaps)}
    files[manifest.vmstate.id] = manifest.vmstate.bytes
    return Shape(snapshot_id, manifest.parent, manifest.template, files, frozenset(manifest.made), manifest_bytes)


def dependents(snapshot_id: str, shapes: Mapping[str, Shape]) -> list[str]:
    """Return who of `shapes` depends on a snapshot, sorted: those taken over it as their template, and those that use
    a file which it, and none of the others, has written.

    `made` alone would say too much: the same bytes written by two snapshots are one file, and both made it.
    """
    own = shapes.get(snapshot_id)
    if own is None:
        return []
    makers = Counter(ref for shape in shapes.values() for ref in shape.made)
    only_mine = {ref for ref in own.made if makers[ref] == 1}
    return sorted(
        other.id
        for other in shapes.values()
        if other.id != snapshot_id and (other.template == snapshot_id or not only_mine.isdisjoint(other.files))
    )


def tree_parents(shapes: Mapping[str, Shape], parents: Mapping[str, str]) -> dict[str, str]:
    """Return each snapshot's parent in the tree: `parents` (by the caller's rows) or the manifest's, if it is still
    there; else its template; "" for a root. A loop, which only damaged rows could make, is cut."""
    out: dict[str, str] = {}
    for ref, shape in shapes.items():
        choices = (parents.get(ref, ""), shape.parent, shape.template)
        out[ref] = next((one for one in choices if one in shapes and one != ref), "")
    for ref in out:
        seen = {ref}
        at = ref
        while out[at]:
            if out[at] in seen:
                out[at] = ""
                break
            at = out[at]
            seen.add(at)
    return out


def shares(shapes: Mapping[str, Shape], tree: Mapping[str, str]) -> dict[str, Share]:
    """Return each snapshot's bytes; `tree` as `tree_parents` returns it.

    A file is freed with the branch whose root is the nearest common ancestor of all that refer to it: so each file is
    added there once, and the sums go up the tree.
    """
    users: dict[str, list[str]] = {}
    for ref, shape in shapes.items():
        for file in shape.files:
            users.setdefault(file, []).append(ref)
    depth = _depths(tree)
    branch = {ref: shape.manifest_bytes for ref, shape in shapes.items()}
    owned: Counter[str] = Counter()
    for file, refs in users.items():
        size = shapes[refs[0]].files[file]
        if len(refs) == 1:
            owned[refs[0]] += size
        top = _common_ancestor(refs, tree, depth)
        if top:
            branch[top] += size
    templates = {shape.template for shape in shapes.values()}
    for ref in sorted(shapes, key=lambda one: -depth[one]):
        if tree[ref]:
            branch[tree[ref]] += branch[ref]
    out = {}
    for ref, shape in shapes.items():
        stored = sum(shape.files.values()) + shape.manifest_bytes
        mine = owned[ref] + shape.manifest_bytes
        out[ref] = Share(stored, mine, stored - mine, 0 if ref in templates else mine, branch[ref])
    return out


def _depths(tree: Mapping[str, str]) -> dict[str, int]:
    depth: dict[str, int] = {}
    for ref in tree:
        path = []
        at = ref
        while at and at not in depth:
            path.append(at)
            at = tree[at]
        base = depth[at] + 1 if at else 0
        for number, one in enumerate(reversed(path)):
            depth[one] = base + number
    return depth


def _common_ancestor(refs: Iterable[str], tree: Mapping[str, str], depth: Mapping[str, int]) -> str:
    """Return the nearest snapshot that all `refs` descend from (or are), "" if they are in different trees."""
    top = ""
    for number, ref in enumerate(refs):
        if number == 0:
            top = ref
            continue
        at = ref
        while at != top:
            if not at or not top:
                return ""
            if depth[at] >= depth[top]:
                at = tree[at]
            else:
                top = tree[top]
    return top
