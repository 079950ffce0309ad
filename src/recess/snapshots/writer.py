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
from dataclasses import replace

import numpy as np

from recess.blobs import BlobStore
from recess.errors import BadInput, NotFound
from recess.frames import SeekableFile, WorkPool, build_seekable
from recess.snapshots.classify import IS_BASE, IS_ZERO, against_base, first_equal, look_up, take
from recess.snapshots.contract import PageData, PageSource, RawPart, SnapshotMeta, TemplatePages, WriteReport
from recess.snapshots.joining import Joiner
from recess.snapshots.keys import LAYER, PAGEMAP, SNAPSHOT, VMSTATE, is_id, key_of, keys_of
from recess.snapshots.layer_v1 import build_layer
from recess.snapshots.manifest_v1 import VMSTATE_RAW_MAX, FileV1, ManifestV1, PartV1, VmstateV1, encode_manifest
from recess.snapshots.pack_v1 import build_pack
from recess.snapshots.pagemap import KIND_BLOCKS, KIND_LAYER, PAGES_MAX, PageMap, Source, same_leaves, union
from recess.snapshots.pagemap_v1 import LEAF_PAGES, Tree, encode_changed, encode_leaves
from recess.snapshots.parent import Parent
from recess.snapshots.pending import Part
from recess.snapshots.publish import Pins, Publication
from recess.snapshots.reader import VMSTATE_KIND, OpenSnapshot, read_manifest
from recess.snapshots.recall import Recall, Written
from recess.snapshots.rewrite import Usage, rewrites
from recess.units import PAGE_BYTES

PACKS_MAX = 4  # page-map files of one snapshot: small, cheap to rewrite, each an open at restore
_SOURCE_NAMES = ("image", "kernel")  # what the sources are called in a report, in their order
_VMSTATE_FRAME = 1 << 20


class SnapshotWriter:
    """Writes one snapshot; used once. `frame_bytes`, `level`: of the layer. Errors: see `SnapshotStore.write`."""

    def __init__(
        self,
        blobs: BlobStore,
        pins: Pins,
        pool: WorkPool,
        io: ThreadPoolExecutor,
        recall: Recall,
        joiner: Joiner,
        *,
        frame_bytes: int,
        level: int,
    ) -> None:
        self._blobs = blobs
        self._pool = pool
        self._recall = recall
        self._joiner = joiner
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
        started, cpu_s = self._clock, time.thread_time() + self._pool.cpu_s
        with self._publication as publication:
            vm_file = self._build_vmstate(vmstate)
            vm_id = publication.add(VMSTATE, vm_file)
            parts = [self._compare_with_base(raw, template) for raw in raws]
            parent = self._open_parent(parent_id, publication) if parent_id else None
            if parent is not None:
                parent.check(raws, template)
                parent.compare(parts, self._count)
                self._lap("parent")
            self._compare_with_sources(parts, sources)
            if parent is not None:
                parts += parent.read_moving(parts)
                self._lap("rewrite")
            new_layers = self._pack_the_rest(parts)
            maps = {raw.name: union([p.page_map() for p in parts if p.raw.name == raw.name]) for raw in raws}
            trees = {name: self._encode_map(name, page_map, parent) for name, page_map in maps.items()}
            packs, written = self._store_maps(maps, trees, parent)
            layers = self._layers(parent, new_layers)
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
                    parts={name: _part_record(page_map, trees[name].root) for name, page_map in maps.items()},
                    vmstate=VmstateV1(vm_id, vm_file.size_bytes, len(vmstate)),
                    layers=layers,
                    pagemaps=packs,
                    sources=sorted({s.digest.hex() for m in maps.values() for s in m.sources if s.kind == KIND_BLOCKS}),
                    made=sorted(set(publication.made)),
                )
            )
            publication.commit(snapshot_id, data)
            self._recall.note_snapshot(snapshot_id, replace(written, layers=layers))
            self._joiner.taken(parent.joined if parent is not None else ())
            self._lap("publish")
        self._timings["total"] = time.perf_counter() - started
        return WriteReport(
            snapshot_id,
            publication.new_bytes,
            sum(file.entries for file in new_layers),
            {name: count for name, count in self._shared.items() if count},
            self._timings,
            time.thread_time() + self._pool.cpu_s - cpu_s,
        )

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._timings[name] = self._timings.get(name, 0.0) + now - self._clock
        self._clock = now

    def _count(self, name: str, pages: int) -> None:
        self._shared[name] = self._shared.get(name, 0) + int(pages)  # numpy's is no JSON

    def _open_parent(self, parent_id: str, publication: Publication) -> Parent:
        """Open the parent, and keep what it names from being swept. Raises NotFound, Corrupt, Incompatible."""
        manifest = read_manifest(self._blobs, parent_id)
        publication.hold(key for ref in manifest.files() for key in keys_of(ref))
        # A manifest goes before its files: if it is still there, none of them went before they were held.
        if not self._blobs.exists(key_of(parent_id)):
            raise NotFound(f"no such snapshot: {parent_id}", kind="snapshot", ref=parent_id)
        joined = self._joiner.ready_for(manifest.layers, publication.hold)
        opened = OpenSnapshot(self._blobs, parent_id, self._pool, manifest=manifest, also=[one.file for one in joined])
        return Parent(self._blobs, opened, self._pool, self._recall, joined)

    def _layers(self, parent: Parent | None, new: Sequence[FileV1]) -> list[FileV1]:
        """Return all layers in use, sorted, and count those as this snapshot's that were joined for it. A new layer may come
        out as the very file that is kept: a page that went back to what it was, while another page still refers to its old slot."""
        kept = parent.kept if parent is not None else []
        here = {file.id for file in parent.manifest.layers} if parent is not None else set()
        for file in (file for file in kept if file.id not in here):
            self._publication.made.append(file.id)
            self._publication.new_bytes += file.bytes
        by_id = {file.id: file for file in (*kept, *new)}  # the new record says that every slot is in use
        return [by_id[ref] for ref in sorted(by_id)]

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

    def _compare_with_base(self, raw: RawPart, template: TemplatePages | None) -> Part:
        """Drop the pages that are the base's; note those that are zeros where the base is not."""
        base = None if template is None else template.part(raw.name)
        if base is not None and len(base) != raw.pages_total:
            raise BadInput(f"part {raw.name} has {raw.pages_total} pages, its template {len(base)}")
        held = None if template is None else template.held(raw.name)
        kind = against_base(raw.data, raw.indices, base, self._pool, zeros=raw.zeros, held=held)
        part = Part(raw, np.flatnonzero(kind != IS_BASE))
        self._count("zero" if base is None else "template", len(kind) - len(part.rows))
        zero = kind[part.rows] == IS_ZERO
        part.settle(None, zero, np.zeros(len(zero), np.int64))
        self._count("zero", zero.sum())
        self._lap("base")
        return part

    def _compare_with_sources(self, parts: Sequence[Part], sources: Sequence[PageSource]) -> None:
        for number, source in enumerate(sources):
            name = _SOURCE_NAMES[number] if number < len(_SOURCE_NAMES) else "source"
            key = Source(KIND_BLOCKS, bytes.fromhex(source.source_hash))
            for part in parts:
                blocks = look_up(part.raw.data, part.rows, source.lookup_many, self._pool)
                self._count(name, (blocks >= 0).sum())
                part.settle(key, blocks >= 0, blocks)
        self._lap("sources")

    def _pack_the_rest(self, parts: Sequence[Part]) -> list[FileV1]:
        """Put the remaining pages into a new layer, equal ones once; return its record, or nothing if none remain."""
        open_rows = [(part.raw.data, part.rows) for part in parts]
        prints = [part.prints(self._pool)[part.rows] for part in parts]
        canonical = first_equal(open_rows, self._pool, prints)
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
        draft = self._publication.begin()
        file = build_layer(
            owners, pages_of, frame_bytes=self._frame_bytes, level=self._level, pool=self._pool, write=draft.write
        )
        layer_id = self._publication.add(LAYER, file, draft)
        self._recall.note_layer(layer_id, np.concatenate(prints)[fresh])
        source = Source(KIND_LAYER, bytes.fromhex(file.index_hash))
        for part, low, high in zip(parts, bounds, bounds[1:], strict=False):
            part.settle(source, np.ones(len(part.rows), np.bool_), slots[low:high])
        self._lap("compress")
        entries = int(fresh.sum())
        return [FileV1(layer_id, file.size_bytes, entries, entries)]

    def _encode_map(self, name: str, page_map: PageMap, parent: Parent | None) -> Tree:
        """Encode a part's map, but for the leaves that this process knows to be as they were."""
        before = parent.known if parent is not None else None
        if before is None or name not in before.maps:
            return encode_changed(page_map, {})
        same = same_leaves(before.maps[name], page_map, LEAF_PAGES)
        return encode_changed(page_map, {number: before.leaves[name][number] for number in same.tolist()})

    def _store_maps(
        self, maps: dict[str, PageMap], trees: dict[str, Tree], parent: Parent | None
    ) -> tuple[list[FileV1], Written]:
        """Store the nodes that no old pack has; return the packs in use, sorted by id, and what there is to remember."""
        nodes = {digest: node for tree in trees.values() for digest, node in tree.nodes.items()}
        missing = {*nodes, *(digest for tree in trees.values() for digest in tree.leaves.values())}
        records = parent.pack_records() if parent is not None else {}
        in_pack: dict[str, set[bytes]] = {}
        for pack_id, content in (parent.packs() if parent is not None else {}).items():
            in_pack[pack_id] = missing & content
            missing -= in_pack[pack_id]
        usages = [Usage(ref, len(used), records[ref].entries) for ref, used in in_pack.items() if used]
        rewritten = rewrites(usages, budget=sum(usage.live for usage in usages), files_max=PACKS_MAX)
        missing = missing.union(*(in_pack[ref] for ref in rewritten))
        kept = [usage for usage in usages if usage.id not in rewritten]
        packs = [FileV1(usage.id, records[usage.id].bytes, usage.entries, usage.live) for usage in kept]
        known = {usage.id: frozenset(in_pack[usage.id]) for usage in kept}
        if missing:
            for name, tree in trees.items():
                absent = [number for number, digest in tree.leaves.items() if digest in missing and digest not in nodes]
                nodes.update((tree.leaves[n], node) for n, node in encode_leaves(maps[name], absent))
            file = build_pack(
                {digest: nodes[digest] for digest in missing},
                frame_bytes=self._frame_bytes,
                level=self._level,
                pool=self._pool,
            )
            pack_id = self._publication.add(PAGEMAP, file)
            packs.append(FileV1(pack_id, file.size_bytes, len(missing), len(missing)))
            known[pack_id] = frozenset(missing)
        self._lap("page maps")
        written = Written(maps, {name: tree.leaves for name, tree in trees.items()}, known)
        return sorted(packs, key=lambda pack: pack.id), written


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
        if raw.zeros is not None and (raw.zeros.shape != indices.shape or raw.zeros.dtype != np.bool_):
            raise BadInput(f"part {raw.name}: {len(indices)} page numbers, but a mask of shape {raw.zeros.shape}")
        if len(indices) and (int(indices[-1]) >= raw.pages_total or (indices[1:] <= indices[:-1]).any()):
            raise BadInput(f"part {raw.name}: page numbers are not ascending or out of range")
