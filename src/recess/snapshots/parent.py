"""What a new snapshot takes over from its parent, and what of it is written anew instead.

The parent's page maps come from memory where this process wrote them (`recall`), else from the store. A captured page
that is the parent's refers to its slot: which pages to compare at all is proposed by fingerprints where the layer's are
known; else all of them are, or none where that is not worth the decoding (`rewrite.worth_comparing`). Equality is always
decided by comparing bytes. Nothing is referred to unless it is there now, whatever was remembered of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

import numpy as np
from numpy.typing import NDArray

from recess.blobs import BlobStore
from recess.errors import BadInput, Corrupt
from recess.frames import WorkPool
from recess.snapshots.classify import words
from recess.snapshots.contract import PageData, RawPart, TemplatePages
from recess.snapshots.forms import stored_form
from recess.snapshots.joining import Joined, moved
from recess.snapshots.keys import LAYER, key_of, make_id
from recess.snapshots.manifest_v1 import FileV1, ManifestV1
from recess.snapshots.pagemap import KIND_LAYER, PageMap, Source, distinct
from recess.snapshots.pending import Part, Rows
from recess.snapshots.reader import OpenSnapshot
from recess.snapshots.recall import Recall, Written
from recess.snapshots.rewrite import Usage, budget_of, late_rewrites, rewrites, worth_comparing

Count = Callable[[str, int], None]  # (why pages cost nothing, how many)
_Found = dict[
    Source, tuple[NDArray[np.bool_], NDArray[np.int64]]
]  # per layer, over all rows: which are equal, and slots


class Parent:
    """The parent of one snapshot that is being written. `joined`: layers that hold what it uses of others, and are used in their
    place. `kept`: its layers that stay in use, after `compare`."""

    def __init__(
        self, blobs: BlobStore, opened: OpenSnapshot, pool: WorkPool, recall: Recall, joined: Sequence[Joined]
    ) -> None:  # fmt: skip
        self._blobs = blobs
        self._pool = pool
        self._recall = recall
        self._open = opened
        self.joined = joined
        self._moving: dict[Source, int] = {}  # slots below this are written anew
        self.known: Written | None = recall.written(opened.id)
        self.kept: list[FileV1] = []

    @property
    def manifest(self) -> ManifestV1:
        """The parent's manifest."""
        return self._open.manifest

    def check(self, raws: Sequence[RawPart], template: TemplatePages | None) -> None:
        """Raise BadInput if a part inherits from a snapshot whose gaps mean another template."""
        ours = template.template_id if template is not None else ""
        if self.manifest.template != ours and any(raw.inherits for raw in raws):
            raise BadInput(
                f"nothing can be inherited from snapshot {self._open.id[:16]}: it stands on another template"
            )

    def page_map(self, raw: RawPart) -> PageMap | None:
        """Return the parent's map of a part, over the joined layers. Raises BadInput if it cannot be inherited and has to be."""
        theirs = None
        if raw.name in self.manifest.parts:
            theirs = self.known.maps.get(raw.name) if self.known is not None else self._open.page_map(raw.name)
        if raw.inherits and (theirs is None or theirs.pages_total != raw.pages_total):
            raise BadInput(f"part {raw.name} cannot inherit from snapshot {self._open.id[:16]}")
        return moved(theirs, self.joined) if theirs is not None and self.joined else theirs

    def packs(self) -> Mapping[str, Set[bytes]]:
        """Return which nodes are in which pack. Raises Corrupt, NotFound."""
        if self.known is None:
            return {ref: nodes.keys() for ref, nodes in self._open.packs.items()}
        self._look(self.manifest.pagemaps)
        return self.known.packs

    def _look(self, files: Sequence[FileV1]) -> None:
        """Make sure that files are there. Raises NotFound, Corrupt (one was cut)."""

        def look(file: FileV1) -> None:
            found = stored_form(self._blobs, file.id)
            if found.key == key_of(file.id) and found.size_bytes != file.bytes:
                raise Corrupt(f"{file.id} has another size than when it was stored", blob=file.id)

        self._pool.each([partial(look, file) for file in files])  # a remote store takes its time for each

    def compare(self, parts: Sequence[Part], count: Count) -> None:
        """Refer to the parent's slots where the bytes are the same, and take over what was not captured.

        What is to be written anew (`rewrite`) is not referred to: its captured pages stay among the open ones, and
        `read_moving` brings the others.
        """
        found: list[_Found] = []
        used: dict[Source, list[NDArray[np.int64]]] = {}
        for part in parts:
            theirs = self.page_map(part.raw)
            found.append({} if theirs is None else self._same(part, theirs))
            for source, (same, slots) in found[-1].items():
                used.setdefault(source, []).append(slots[same])
            if part.raw.inherits and theirs is not None:
                part.inherited = theirs.without(part.raw.indices)
                count("inherited", part.inherited.count)
                for origin, rows in part.inherited.rows_by_source().items():
                    if origin is not None and origin.kind == KIND_LAYER:
                        used.setdefault(origin, []).append(part.inherited.position[rows].astype(np.int64))
        self._decide(used, new_pages=sum(len(part.rows) for part in parts))
        for part, matches in zip(parts, found, strict=True):
            for source, (same, slots) in matches.items():
                same &= slots >= self._moving.get(source, 0)
                still = same[part.rows]
                part.settle(source, still, slots[part.rows])
                count("parent", int(still.sum()))
        if any(part.raw.inherits for part in parts):
            self._look(self.kept)  # nobody may have read them here

    def _decide(self, used: Mapping[Source, Sequence[NDArray[np.int64]]], *, new_pages: int) -> None:
        """Settle which layers stay in use, and which slots of the others move into the new one."""
        records = {file.id: file for file in (*self.manifest.layers, *(one.file for one in self.joined))}
        live: dict[str, tuple[Source, NDArray[np.int64]]] = {}
        for source in sorted(used):
            ref = make_id(LAYER, source.digest.hex())
            slots = np.concatenate(used[source])
            if len(slots) and int(slots.max()) >= records[ref].entries:
                raise Corrupt(f"snapshot {self._open.id[:16]} is wrong about {ref[:16]}", blob=self._open.id)
            slots = distinct(slots, records[ref].entries)
            if len(slots):
                live[ref] = (source, slots)
        usages = [Usage(ref, len(slots), records[ref].entries) for ref, (_, slots) in live.items()]
        if self.known is None:
            moving = rewrites(usages, budget=budget_of(new_pages))
        else:
            before = {ref: record.live for ref, record in records.items()}
            moving = late_rewrites(usages, before, new_pages=new_pages)
        for usage in usages:
            source, slots = live[usage.id]
            gone = moving.get(usage.id, 0)
            if gone:
                self._moving[source] = int(slots[gone]) if gone < len(slots) else usage.entries
            if gone < len(slots):
                self.kept.append(FileV1(usage.id, records[usage.id].bytes, usage.entries, usage.live - gone))

    def _same(self, part: Part, theirs: PageMap) -> _Found:
        """Return per layer of the parent, over all captured rows: which are equal to it, and in which slot."""
        raw = part.raw
        if not theirs.count or not len(part.rows):
            return {}
        at = np.minimum(np.searchsorted(theirs.pages, raw.indices[part.rows]), theirs.count - 1)
        listed = theirs.pages[at] == raw.indices[part.rows]
        rows, at = part.rows[listed], at[listed]
        tasks: list[Callable[[], None]] = []
        out: _Found = {}
        for number in distinct(theirs.source[at], 1 + len(theirs.sources)).tolist():
            source = theirs.sources[number - 1] if number else None
            if source is None or source.kind != KIND_LAYER:
                continue  # zeros and blocks are found again without their help
            mine = theirs.source[at] == number
            targets, slots = self._proposed(part, source, rows[mine], theirs.position[at[mine]].astype(np.int64))
            if not len(slots):
                continue
            same = np.zeros(len(raw.data), np.bool_)
            slot_of = np.zeros(len(raw.data), np.int64)
            slot_of[targets] = slots
            layer = self._open.layer(make_id(LAYER, source.digest.hex()))
            tasks += layer.visits(slots, partial(_mark_equal, same, words(raw.data), targets))
            out[source] = (same, slot_of)
        self._pool.each(tasks)
        return out

    def _proposed(self, part: Part, source: Source, rows: Rows, slots: NDArray[np.int64]) -> tuple[Rows, Rows]:
        """Return those of the rows, and their slots, that are worth a look, in the order of the slots."""
        layer_id = make_id(LAYER, source.digest.hex())
        prints = self._recall.prints(layer_id)
        if prints is not None:
            alike = part.prints(self._pool)[rows] == prints[slots]
            rows, slots = rows[alike], slots[alike]
        order = np.argsort(slots, kind="stable")
        rows, slots = rows[order], slots[order]
        if prints is None and len(slots):
            frames = self._open.layer(layer_id).frames_of(slots)
            if not worth_comparing(len(slots), frames, inherits=part.raw.inherits):
                return rows[:0], slots[:0]
        return rows, slots

    def read_moving(self, parts: Sequence[Part]) -> list[Part]:
        """Return what is inherited from layers that it is to leave as parts of its own, with its content: it is packed
        anew. Takes it out of the inherited maps. Raises Corrupt, NotFound."""
        out = []
        for part in parts:
            theirs = part.inherited
            if theirs is None or not self._moving:
                continue
            below = np.array([0, *(self._moving.get(source, 0) for source in theirs.sources)], np.int64)
            moving = theirs.position < below[theirs.source]
            if moving.any():
                gone = theirs.select(moving)
                raw = RawPart(part.raw.name, part.raw.pages_total, gone.pages, self._open.read_pages(gone, {}))
                out.append(Part(raw, np.arange(gone.count)))
                part.inherited = theirs.select(~moving)
        return out

    def pack_records(self) -> dict[str, FileV1]:
        """Return the manifest's records of packs by id."""
        return {file.id: file for file in self.manifest.pagemaps}


def _mark_equal(
    same: NDArray[np.bool_], mine: NDArray[np.uint64], targets: Rows, low: int, high: int, pages: PageData
) -> None:
    rows = targets[low:high]
    same[rows] = (mine[rows] == words(np.ascontiguousarray(pages))).all(axis=1)
