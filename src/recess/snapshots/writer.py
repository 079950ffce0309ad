"""Writing one snapshot: find what is already known, pack what is not, publish.

Each captured page is, in this order: equal to the base (then it is not listed at all), zeros, equal to the parent
snapshot's page of the same number (then its slot is referred to), a block of a source, equal to another page of this
snapshot (one slot for both), or new. Every equality was compared byte for byte.

A page that was not captured is the template's, or in a part that `inherits` the parent's. In the first case the parent
only saves bytes, and a page of a layer that is to be rewritten is at hand; in the second the parent's map is taken over
where nothing was captured, and what lies in a layer that is to be rewritten is read from it. Either way the new
snapshot names every file it needs: the parent may be deleted afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from recess.blobs import BlobStore
from recess.errors import BadInput, NotFound
from recess.frames import SeekableFile, WorkPool, build_seekable
from recess.snapshots.classify import IS_BASE, IS_ZERO, against_base, first_equal, look_up, take, words
from recess.snapshots.contract import PageData, PageSource, RawPart, SnapshotMeta, TemplatePages, WriteReport
from recess.snapshots.keys import LAYER, PAGEMAP, SNAPSHOT, VMSTATE, digest_of, is_id, key_of, keys_of, make_id
from recess.snapshots.layer_v1 import build_layer
from recess.snapshots.manifest_v1 import VMSTATE_RAW_MAX, FileV1, ManifestV1, PartV1, VmstateV1, encode_manifest
from recess.snapshots.pack_v1 import build_pack
from recess.snapshots.pagemap import KIND_BLOCKS, KIND_LAYER, PAGES_MAX, PageMap, Source, merge, union
from recess.snapshots.pagemap_v1 import encode_tree
from recess.snapshots.publish import Pins, Publication
from recess.snapshots.reader import VMSTATE_KIND, OpenSnapshot
from recess.snapshots.rewrite import Usage, files_to_rewrite, worth_comparing
from recess.units import PAGE_BYTES

PACKS_MAX = 4  # page-map files of one snapshot: small, cheap to rewrite, each an open at restore
_SOURCE_NAMES = ("image", "kernel")  # what the sources are called in a report, in their order
_VMSTATE_FRAME = 1 << 20

Rows = NDArray[np.int64]


@dataclass
class _Part:
    """One part on its way. `known`: per source the rows that are there already and their positions. `rows`: the rest.
    `inherited`: the parent's map of the pages that were not captured."""

    raw: RawPart
    rows: Rows
    known: dict[Source | None, tuple[Rows, NDArray[np.int64]]] = field(default_factory=dict)
    inherited: PageMap | None = None

    def page_map(self) -> PageMap:
        """Return the map of all that is settled."""
        mine = merge(self.raw.pages_total, self.raw.indices, self.known)
        return mine if self.inherited is None else union([mine, self.inherited])

    def settle(self, source: Source | None, found: NDArray[np.bool_], positions: NDArray[np.int64]) -> None:
        """Note that the rows where `found` (a mask over `rows`) holds are in `source` at these positions."""
        if found.any():
            old_rows, old_positions = self.known.get(source, (np.empty(0, np.int64), np.empty(0, np.int64)))
            self.known[source] = (
                np.concatenate((old_rows, self.rows[found])),
                np.concatenate((old_positions, positions[found])),
            )
            self.rows = self.rows[~found]


class SnapshotWriter:
    """Writes one snapshot; used once. `frame_bytes`, `level`: of the layer. Errors: see `SnapshotStore.write`."""

    def __init__(
        self,
        blobs: BlobStore,
        pins: Pins,
        pool: WorkPool,
        io: ThreadPoolExecutor,
        *,
        frame_bytes: int,
        level: int,
    ) -> None:
        self._blobs = blobs
        self._pool = pool
        self._frame_bytes = frame_bytes
        self._level = level
        self._publication = Publication(blobs, pins, io)
        self._shared: dict[str, int] = {}
        self._timings: dict[str, float] = {}
        self._clock = time.perf_counter()

    def write(
        self,
        raws: Sequence[RawPart],
        vmstate: bytes,
        meta: SnapshotMeta,
        *,
        template: TemplatePages | None,
        parent_id: str,
        sources: Sequence[PageSource],
    ) -> WriteReport:
        """Do it all; the snapshot is durable when this returns."""
        _check_input(raws, vmstate, template, parent_id)
        started = self._clock
        with self._publication as publication:
            vm_file = self._build_vmstate(vmstate)
            vm_id = publication.add(VMSTATE, vm_file)
            parts = [self._compare_with_base(raw, template) for raw in raws]
            parent = OpenSnapshot(self._blobs, parent_id, self._pool) if parent_id else None
            kept_layers: list[FileV1] = []
            if parent is not None:
                publication.hold(key for ref in parent.manifest.files() for key in keys_of(ref))
                # A manifest goes before its files: if it is still there, none of them went before they were held.
                if not self._blobs.exists(key_of(parent_id)):
                    raise NotFound(f"no such snapshot: {parent_id}", kind="snapshot", ref=parent_id)
                _check_parent(raws, parent, template)
                kept_layers = self._compare_with_parent(parts, parent)
            self._compare_with_sources(parts, sources)
            if parent is not None:
                parts += self._read_rewritten(
                    parts, parent, {bytes.fromhex(digest_of(file.id)) for file in kept_layers}
                )
            new_layers = self._pack_the_rest(parts)
            maps = {raw.name: union([p.page_map() for p in parts if p.raw.name == raw.name]) for raw in raws}
            roots, packs = self._build_maps(maps, parent)
            snapshot_id, data = encode_manifest(
                ManifestV1(
                    created_ms=int(meta.created * 1000),
                    template=template.template_id if template is not None else "",
                    parent=parent_id,
                    fingerprint=dict(meta.fingerprint),
                    spec=dict(meta.spec),
                    origin=dict(meta.origin),
                    machine=meta.machine,
                    session=meta.session,
                    log_position=meta.log_position,
                    epoch=meta.epoch,
                    why=meta.why,
                    forkable=meta.forkable,
                    parts={name: _part_record(page_map, roots[name]) for name, page_map in maps.items()},
                    vmstate=VmstateV1(vm_id, vm_file.size_bytes, len(vmstate)),
                    layers=_joined(kept_layers, new_layers),
                    pagemaps=packs,
                    sources=sorted({s.digest.hex() for m in maps.values() for s in m.sources if s.kind == KIND_BLOCKS}),
                    made=sorted(set(publication.made)),
                )
            )
            publication.commit(snapshot_id, data)
            self._lap("publish")
        self._timings["total"] = time.perf_counter() - started
        return WriteReport(
            snapshot_id,
            publication.new_bytes,
            sum(file.entries for file in new_layers),
            {name: count for name, count in self._shared.items() if count},
            self._timings,
        )

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._timings[name] = self._timings.get(name, 0.0) + now - self._clock
        self._clock = now

    def _count(self, name: str, pages: int) -> None:
        self._shared[name] = self._shared.get(name, 0) + int(pages)

    def _build_vmstate(self, vmstate: bytes) -> SeekableFile:
        view = memoryview(vmstate)
        count = -(-len(view) // _VMSTATE_FRAME)
        return build_seekable(
            VMSTATE_KIND,
            count,
            lambda i: view[i * _VMSTATE_FRAME : (i + 1) * _VMSTATE_FRAME],
            b"",
            level=self._level,
            pool=self._pool,
        )

    def _compare_with_base(self, raw: RawPart, template: TemplatePages | None) -> _Part:
        """Drop the pages that are the base's; note those that are zeros where the base is not."""
        base = None if template is None else template.part(raw.name)
        if base is not None and len(base) != raw.pages_total:
            raise BadInput(f"part {raw.name} has {raw.pages_total} pages, its template {len(base)}")
        kind = against_base(raw.data, raw.indices, base, self._pool)
        part = _Part(raw, np.flatnonzero(kind != IS_BASE))
        self._count("zero" if base is None else "template", len(kind) - len(part.rows))
        zero = kind[part.rows] == IS_ZERO
        part.settle(None, zero, np.zeros(len(zero), np.int64))
        self._count("zero", zero.sum())
        self._lap("base")
        return part

    def _compare_with_parent(self, parts: Sequence[_Part], parent: OpenSnapshot) -> list[FileV1]:
        """Refer to the parent's slots where the bytes are the same; return the old layers still in use.

        Layers that are not worth keeping (`rewrite`) are not referred to: their pages stay among the rest.
        """
        found: list[dict[Source, tuple[NDArray[np.bool_], NDArray[np.int64]]]] = []
        used: dict[Source, list[NDArray[np.int64]]] = {}
        for part in parts:
            theirs = self._parents_map(part.raw, parent)
            found.append({} if theirs is None else self._same_as_parent(part, theirs, parent))
            for source, (same, slots) in found[-1].items():
                used.setdefault(source, []).append(slots[same])
            if part.raw.inherits and theirs is not None:
                part.inherited = theirs.without(part.raw.indices)
                self._count("inherited", part.inherited.count)
                for origin, rows in part.inherited.rows_by_source().items():
                    if origin is not None and origin.kind == KIND_LAYER:
                        used.setdefault(origin, []).append(part.inherited.position[rows].astype(np.int64))
        live = {source: len(np.unique(np.concatenate(used[source]))) for source in sorted(used)}
        records = {file.id: file for file in parent.manifest.layers}
        ids = {source: make_id(LAYER, source.digest.hex()) for source in live}
        usages = [Usage(ids[source], count, records[ids[source]].entries) for source, count in live.items() if count]
        rewritten = files_to_rewrite(usages)
        for part, matches in zip(parts, found, strict=True):
            for source, (same, slots) in matches.items():
                if ids[source] not in rewritten:
                    still = np.isin(part.rows, np.flatnonzero(same))  # masks are over all captured rows
                    part.settle(source, still, slots[part.rows])
                    self._count("parent", still.sum())
        kept = [
            FileV1(usage.id, records[usage.id].bytes, usage.entries, usage.live)
            for usage in usages
            if usage.id not in rewritten
        ]
        for file in kept if any(part.raw.inherits for part in parts) else []:
            parent.layer(file.id)  # nobody may have read it here: a snapshot must not refer to what is not there
        self._lap("parent")
        return kept

    def _parents_map(self, raw: RawPart, parent: OpenSnapshot) -> PageMap | None:
        """Return the parent's map of a part. Raises BadInput if it cannot be inherited and has to be."""
        theirs = parent.page_map(raw.name) if raw.name in parent.manifest.parts else None
        if raw.inherits and (theirs is None or theirs.pages_total != raw.pages_total):
            raise BadInput(f"part {raw.name} cannot inherit from snapshot {parent.id[:16]}")
        return theirs

    def _read_rewritten(self, parts: Sequence[_Part], parent: OpenSnapshot, kept: set[bytes]) -> list[_Part]:
        """Return what is inherited from layers that are not kept as parts of its own, with its content: it is packed
        anew. Takes it out of the inherited maps."""
        out = []
        for part in parts:
            theirs = part.inherited
            if theirs is None:
                continue
            going = [0, *(s.kind == KIND_LAYER and s.digest not in kept for s in theirs.sources)]
            moving = np.array(going, np.bool_)[theirs.source]
            if moving.any():
                gone = theirs.select(moving)
                raw = RawPart(part.raw.name, part.raw.pages_total, gone.pages, parent.read_pages(gone, {}))
                out.append(_Part(raw, np.arange(gone.count)))
                part.inherited = theirs.select(~moving)
        self._lap("rewrite")
        return out

    def _same_as_parent(
        self, part: _Part, theirs: PageMap, parent: OpenSnapshot
    ) -> dict[Source, tuple[NDArray[np.bool_], NDArray[np.int64]]]:
        """Return per layer of the parent, over all captured rows: which are equal to it, and in which slot."""
        raw = part.raw
        if not theirs.count:
            return {}
        at = np.minimum(np.searchsorted(theirs.pages, raw.indices[part.rows]), theirs.count - 1)
        listed = theirs.pages[at] == raw.indices[part.rows]
        rows, at = part.rows[listed], at[listed]
        tasks, out = [], {}
        for number in np.unique(theirs.source[at]).tolist():
            source = theirs.sources[number - 1] if number else None
            if source is None or source.kind != KIND_LAYER:
                continue  # zeros and blocks are found again without their help
            mine = theirs.source[at] == number
            places = theirs.position[at[mine]].astype(np.int64)
            order = np.argsort(places, kind="stable")
            targets, slots = rows[mine][order], places[order]
            layer = parent.layer(make_id(LAYER, source.digest.hex()))
            if not worth_comparing(len(slots), layer.frames_of(slots), inherits=raw.inherits):
                continue
            same = np.zeros(len(raw.data), np.bool_)
            slot_of = np.zeros(len(raw.data), np.int64)
            slot_of[targets] = slots
            tasks += layer.visits(slots, partial(_mark_equal, same, words(raw.data), targets))
            out[source] = (same, slot_of)
        self._pool.each(tasks)
        return out

    def _compare_with_sources(self, parts: Sequence[_Part], sources: Sequence[PageSource]) -> None:
        for number, source in enumerate(sources):
            name = _SOURCE_NAMES[number] if number < len(_SOURCE_NAMES) else "source"
            key = Source(KIND_BLOCKS, bytes.fromhex(source.source_hash))
            for part in parts:
                blocks = look_up(part.raw.data, part.rows, source.lookup_many, self._pool)
                self._count(name, (blocks >= 0).sum())
                part.settle(key, blocks >= 0, blocks)
        self._lap("sources")

    def _pack_the_rest(self, parts: Sequence[_Part]) -> list[FileV1]:
        """Put the remaining pages into a new layer, equal ones once; return its record, or nothing if none remain."""
        open_rows = [(part.raw.data, part.rows) for part in parts]
        canonical = first_equal(open_rows, self._pool)
        fresh = canonical == np.arange(len(canonical))
        self._count("duplicate", len(canonical) - fresh.sum())
        self._lap("duplicates")
        if not len(canonical):
            return []
        slots = (np.cumsum(fresh) - 1)[canonical]
        bounds = np.cumsum([0, *(len(part.rows) for part in parts)])
        owned = [part.rows[fresh[low:high]] for part, low, high in zip(parts, bounds, bounds[1:], strict=False)]
        starts = np.cumsum([0, *(len(rows) for rows in owned)])

        def pages_of(low: int, high: int) -> PageData:
            pieces = []
            for part, rows, start in zip(parts, owned, starts.tolist(), strict=False):
                here = rows[max(0, low - start) : max(0, high - start)]
                if len(here):
                    pieces.append(take(part.raw.data, here))
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

        owners = [(part.raw.name, part.raw.indices[rows]) for part, rows in zip(parts, owned, strict=True)]
        file = build_layer(owners, pages_of, frame_bytes=self._frame_bytes, level=self._level, pool=self._pool)
        layer_id = self._publication.add(LAYER, file)
        source = Source(KIND_LAYER, bytes.fromhex(file.index_hash))
        for part, low, high in zip(parts, bounds, bounds[1:], strict=False):
            part.settle(source, np.ones(len(part.rows), np.bool_), slots[low:high])
        self._lap("compress")
        entries = int(fresh.sum())
        return [FileV1(layer_id, file.size_bytes, entries, entries)]

    def _build_maps(
        self, maps: dict[str, PageMap], parent: OpenSnapshot | None
    ) -> tuple[dict[str, bytes], list[FileV1]]:
        """Store the nodes that no old pack has; return the parts' roots and the packs in use, sorted by id."""
        roots: dict[str, bytes] = {}
        nodes: dict[bytes, bytes] = {}
        for name, page_map in maps.items():
            roots[name], tree = encode_tree(page_map)
            nodes.update(tree)
        records = {file.id: file for file in parent.manifest.pagemaps} if parent is not None else {}
        missing = set(nodes)
        in_pack: dict[str, set[bytes]] = {}
        for pack_id, content in (parent.packs if parent is not None else {}).items():
            in_pack[pack_id] = missing & content.keys()
            missing -= in_pack[pack_id]
        usages = [Usage(ref, len(used), records[ref].entries) for ref, used in in_pack.items() if used]
        rewritten = files_to_rewrite(usages, files_max=PACKS_MAX)
        missing = missing.union(*(in_pack[ref] for ref in rewritten))
        packs = [
            FileV1(usage.id, records[usage.id].bytes, usage.entries, usage.live)
            for usage in usages
            if usage.id not in rewritten
        ]
        if missing:
            file = build_pack(
                {digest: nodes[digest] for digest in missing},
                frame_bytes=self._frame_bytes,
                level=self._level,
                pool=self._pool,
            )
            pack_id = self._publication.add(PAGEMAP, file)
            packs.append(FileV1(pack_id, file.size_bytes, len(missing), len(missing)))
        self._lap("page maps")
        return roots, sorted(packs, key=lambda pack: pack.id)


def _check_parent(raws: Sequence[RawPart], parent: OpenSnapshot, template: TemplatePages | None) -> None:
    """Raise BadInput if a part inherits from a snapshot whose gaps mean another template."""
    ours = template.template_id if template is not None else ""
    if parent.manifest.template != ours and any(raw.inherits for raw in raws):
        raise BadInput(f"nothing can be inherited from snapshot {parent.id[:16]}: it stands on another template")


def _mark_equal(
    same: NDArray[np.bool_], mine: NDArray[np.uint64], targets: Rows, low: int, high: int, pages: PageData
) -> None:
    rows = targets[low:high]
    same[rows] = (mine[rows] == words(np.ascontiguousarray(pages))).all(axis=1)


def _joined(kept: Sequence[FileV1], new: Sequence[FileV1]) -> list[FileV1]:
    """Return all layers in use, sorted. A new layer may come out as the very file that is kept: a page that went back
    to what it was, while another page still refers to its old slot."""
    by_id = {file.id: file for file in (*kept, *new)}  # the new record says that every slot is in use
    return [by_id[ref] for ref in sorted(by_id)]


def _part_record(page_map: PageMap, root: bytes) -> PartV1:
    zero, block, layer = page_map.counts()
    return PartV1(page_map.pages_total, zero, block, layer, root.hex())


def _check_input(raws: Sequence[RawPart], vmstate: bytes, template: TemplatePages | None, parent_id: str) -> None:
    """Raise BadInput for parts that contradict themselves."""
    if len({raw.name for raw in raws}) != len(raws):
        raise BadInput("two parts of one snapshot have the same name")
    for ref in (parent_id, template.template_id if template is not None else ""):
        if ref and not is_id(ref, SNAPSHOT):
            raise BadInput(f"not a snapshot id: {ref[:80]!r}")
    if len(vmstate) > VMSTATE_RAW_MAX:
        raise BadInput(f"device state of {len(vmstate)} bytes is over the cap")
    for raw in raws:
        indices, data = raw.indices, raw.data
        if raw.inherits and not parent_id:
            raise BadInput(f"part {raw.name} inherits, but no parent is named")
        if not 0 <= raw.pages_total <= PAGES_MAX:
            raise BadInput(f"part {raw.name} of {raw.pages_total} pages is over the cap")
        if (
            indices.dtype != np.uint32
            or data.shape != (len(indices), PAGE_BYTES)
            or data.dtype != np.uint8
            or not data.flags.c_contiguous
        ):
            raise BadInput(f"part {raw.name}: {len(indices)} page numbers, but pages of shape {data.shape}")
        if len(indices) and (int(indices[-1]) >= raw.pages_total or (indices[1:] <= indices[:-1]).any()):
            raise BadInput(f"part {raw.name}: page numbers are not ascending or out of range")
