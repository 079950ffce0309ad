"""Reading snapshots back: manifest, page maps, pages. Every byte is verified on the way to its user.

A snapshot is opened per call: nothing is cached between calls, so a blob that was damaged meanwhile is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from recess.blobs import BlobStore
from recess.errors import Corrupt, NotFound
from recess.frames import SeekableReader, WorkPool
from recess.snapshots.contract import PageData, PageSource
from recess.snapshots.forms import FAR, NEAR, open_layer, stored_form
from recess.snapshots.keys import LAYER, digest_of, key_of, make_id
from recess.snapshots.layer_v1 import LayerReader
from recess.snapshots.manifest_v1 import (
    MANIFEST_BYTES_MAX,
    VMSTATE_RAW_MAX,
    FileV1,
    ManifestV1,
    PartV1,
    VmstateV1,
    decode_manifest,
)
from recess.snapshots.pack_v1 import KIND as PACK_KIND
from recess.snapshots.pack_v1 import read_pack
from recess.snapshots.pagemap import KIND_LAYER, PageMap, Source
from recess.snapshots.pagemap_v1 import decode_tree
from recess.units import PAGE_BYTES

VMSTATE_KIND = b"VMST"
_BLOCK_BATCH = 256


def read_manifest(blobs: BlobStore, snapshot_id: str) -> ManifestV1:
    """Return the verified manifest. Raises NotFound, Corrupt, Incompatible, BadInput (no snapshot id)."""
    key = key_of(snapshot_id)
    try:
        data = blobs.get(key, max_bytes=MANIFEST_BYTES_MAX)
    except NotFound:
        raise NotFound(f"no such snapshot: {snapshot_id}", kind="snapshot", ref=snapshot_id) from None
    return decode_manifest(snapshot_id, data)


class OpenSnapshot:
    """One snapshot opened for reading. Not shared between threads; the tasks it returns may run in several. `far`: each
    read of a layer is a request to some distant store; `also`: layers that may be read though the manifest does not name them;
    `manifest`: if it was read already."""

    def __init__(
        self, blobs: BlobStore, snapshot_id: str, pool: WorkPool, *, far: bool = False,
        manifest: ManifestV1 | None = None, also: Iterable[FileV1] = (),
    ) -> None:  # fmt: skip
        self._blobs = blobs
        self._far = far
        self._pool = pool
        self.id = snapshot_id
        self.manifest = read_manifest(blobs, snapshot_id) if manifest is None else manifest
        self._records = {file.id: file for file in (*self.manifest.layers, *also)}
        self._layers: dict[str, LayerReader] = {}

    def part(self, name: str) -> PartV1:
        """Return the manifest's record of a part. Raises NotFound."""
        found = self.manifest.parts.get(name)
        if found is None:
            raise NotFound(f"snapshot {self.id[:16]} has no part {name!r}", kind="part", ref=name)
        return found

    def _reader(self, ref: str) -> Callable[[int, int], bytes]:
        return partial(self._blobs.get_range, key_of(ref))

    def layer(self, layer_id: str) -> LayerReader:
        """Return the reader of a layer that the manifest names. Raises NotFound, Corrupt."""
        if layer_id not in self._layers:
            record = self._records.get(layer_id)
            if record is None:
                raise self._corrupt(f"refers to a layer it does not name: {layer_id[:16]}")
            reader = LayerReader(open_layer(self._blobs, layer_id, record.bytes, at_once=FAR if self._far else NEAR))
            if reader.slots != record.entries:
                raise self._corrupt(f"is wrong about {layer_id[:16]}")
            self._layers[layer_id] = reader
        return self._layers[layer_id]

    def open_layers(self, page_map: PageMap) -> None:
        """Open the layers of a map before they are read: afar each costs a request or two, side by side. Raises as `layer`."""
        if self._far:
            wanted = [make_id(LAYER, source.digest.hex()) for source in page_map.sources if source.kind == KIND_LAYER]
            self._pool.each([partial(self.layer, layer_id) for layer_id in wanted])

    def _corrupt(self, why: str) -> Corrupt:
        return Corrupt(f"snapshot {self.id[:16]} {why}", blob=self.id)

    def pack(self, record: FileV1) -> SeekableReader:
        """Return the reader of a page-map pack."""
        return SeekableReader(self._reader(record.id), record.bytes, digest_of(record.id), PACK_KIND, record.id)

    @cached_property
    def packs(self) -> dict[str, dict[bytes, bytes]]:
        """All packs with all their nodes, by id and by hash."""
        found = {}
        for record in self.manifest.pagemaps:
            found[record.id] = read_pack(self.pack(record), self._pool)
            if len(found[record.id]) != record.entries:
                raise self._corrupt(f"is wrong about {record.id[:16]}")
        return found

    def _fetch(self, digest: bytes) -> bytes:
        for nodes in self.packs.values():
            node = nodes.get(digest)
            if node is not None:
                return node
        raise self._corrupt(f"lacks the page map node {digest.hex()[:12]}")

    def page_map(self, name: str) -> PageMap:
        """Return the map of a part, checked against what the manifest says. Raises NotFound, Corrupt."""
        part = self.part(name)
        root = bytes.fromhex(part.root)
        page_map = decode_tree(root, self._fetch, pages_total=part.pages, count=part.listed)
        if page_map.counts() != (part.zero, part.block, part.layer):
            raise self._corrupt(f"is wrong about where the pages of {name} come from")
        known = {Source(KIND_LAYER, bytes.fromhex(digest_of(file.id))) for file in self.manifest.layers}
        if any(s not in known if s.kind == KIND_LAYER else s.digest.hex() not in self.manifest.sources for s in page_map.sources):  # fmt: skip
            raise self._corrupt(f"has pages of {name} in files it does not name")
        return page_map

    def vmstate(self) -> bytes:
        """Return the verified device state. Raises Corrupt."""
        record = self.manifest.vmstate
        reader = SeekableReader(self._reader(record.id), record.bytes, digest_of(record.id), VMSTATE_KIND, record.id)
        data = reader.raw(self._pool, max_bytes=min(record.raw_bytes, VMSTATE_RAW_MAX))
        if len(data) != record.raw_bytes:
            raise self._corrupt("is wrong about its device state")
        return data

    def read_pages(self, page_map: PageMap, sources: Mapping[str, PageSource]) -> PageData:
        """Return the pages of a map in its order, one row each, read and decoded in parallel.

        Raises NotFound if a file of blocks is not among `sources` (by hash), Corrupt.
        """
        out = np.empty((page_map.count, PAGE_BYTES), np.uint8)
        tasks: list[Callable[[], None]] = []
        self.open_layers(page_map)
        for source, rows in page_map.rows_by_source().items():
            if source is None:
                out[rows] = 0
                continue
            order = np.argsort(page_map.position[rows], kind="stable")
            targets, places = rows[order], page_map.position[rows][order].astype(np.int64)
            if source.kind == KIND_LAYER:
                layer = self.layer(make_id(LAYER, source.digest.hex()))
                tasks += layer.visits(places, partial(_copy, out, targets))
            else:
                blocks = _source(sources, source.digest.hex())
                for low in range(0, len(rows), _BLOCK_BATCH):
                    cut = slice(low, low + _BLOCK_BATCH)
                    tasks.append(partial(_read_blocks, out, targets[cut], blocks, places[cut]))
        self._pool.each(tasks)
        return out

    def verify(self) -> dict[str, int]:
        """Read everything this snapshot names, its template apart; return counts. Raises Corrupt, NotFound."""
        m = self.manifest
        files: list[FileV1 | VmstateV1] = [*m.layers, *m.pagemaps, m.vmstate]
        for file in files:
            found = stored_form(self._blobs, file.id)
            if found.key == key_of(file.id) and found.size_bytes != file.bytes:
                raise Corrupt(f"{file.id} has another size than when it was stored", blob=file.id)
        for layer in self.manifest.layers:
            self.layer(layer.id).verify(self._pool)
        self.vmstate()
        used: dict[str, list[NDArray[np.uint32]]] = {}
        pages = 0
        for name in self.manifest.parts:
            page_map = self.page_map(name)
            pages += page_map.count
            for source, rows in page_map.rows_by_source().items():
                if source is not None and source.kind == KIND_LAYER:
                    layer_id = make_id(LAYER, source.digest.hex())
                    used.setdefault(layer_id, []).append(page_map.position[rows])
        for layer in self.manifest.layers:
            slots = np.unique(np.concatenate(used.get(layer.id, [np.empty(0, np.uint32)])))
            if len(slots) != layer.live or (len(slots) and int(slots[-1]) >= layer.entries):
                raise self._corrupt(f"is wrong about what it uses of {layer.id[:16]}")
        size = (
            sum(file.bytes for file in (*self.manifest.layers, *self.manifest.pagemaps)) + self.manifest.vmstate.bytes
        )
        _ = self.packs  # read and checked, even if no part needs them
        return {"files": len(self.manifest.files()) + 1, "bytes": size, "pages": pages}


def by_hash(sources: Iterable[PageSource] | None) -> dict[str, PageSource]:
    """Return page sources by their hash."""
    return {source.source_hash: source for source in sources or ()}


def _source(sources: Mapping[str, PageSource], digest: str) -> PageSource:
    found = sources.get(digest)
    if found is None:
        raise NotFound(
            f"the snapshot refers to an image or kernel file that is not here: {digest[:16]}",
            hint="bring the image back: recess images create",
            kind="image file",
            ref=digest,
        )
    return found


def _copy(out: PageData, targets: NDArray[np.int64], low: int, high: int, pages: PageData) -> None:
    rows = targets[low:high]
    if int(rows[-1]) - int(rows[0]) + 1 == len(rows) and (np.diff(rows) == 1).all():
        out[int(rows[0]) : int(rows[-1]) + 1] = pages
    else:
        out[rows] = pages


def _read_blocks(out: PageData, rows: NDArray[np.int64], source: PageSource, blocks: NDArray[np.int64]) -> None:
    for row, block in zip(rows.tolist(), blocks.tolist(), strict=True):
        out[row] = np.frombuffer(source.read_block(block), np.uint8)
