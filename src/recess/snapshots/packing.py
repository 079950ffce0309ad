"""Layers packed harder for a journey: an archive is made once, by somebody who waits for it, and kept and sent for long.

What goes into an archive instead of a layer as it is stored is its recoded form (`frames.recoded_v1`): the same id, the
same content, proven by the same index, in large frames at a high level. It lies in a store of its own (`packed`), so the
node's own layers keep the small frames that page faults want, and an export that broke off and goes on finds it again. It
is a cache: nothing names it, and it may be removed at any time.

    1. compress into packed/recoded/lyr_..     temporary name, fsync, link: a crash leaves nothing that is read
    2. read it back, every frame proven        every time it is used; one that is damaged goes

The same content, level and frame size give the same bytes, so an archive that goes on after its packed layers were
removed is the same archive. This module must know no addresses, no clock and no configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from recess.blobs import BlobInfo, BlobStore, WrappedBlobs
from recess.blobs.contract import Ranges
from recess.crashpoints import crash_point
from recess.errors import BadInput, Corrupt, NotFound, OutOfSpace, Unsupported
from recess.frames import FRAME_RAW_BYTES_MAX, LEVEL_MAX, LEVEL_MIN, WorkPool, recode
from recess.snapshots.archive_v1 import Announcement
from recess.snapshots.forms import open_layer, stored_form
from recess.snapshots.keys import LAYER, id_of, is_id, recoded_key_of
from recess.snapshots.recompress import read_back
from recess.snapshots.transfer import Item, Tell, closure, sized_manifest
from recess.units import MIB, PAGE_BYTES, format_bytes


@dataclass(frozen=True)
class Packing:
    """How hard. `content_bytes_max`: of all layers that are packed together, unpacked; what is beyond goes as it is
    stored, for this level takes a quarter of a second of a core for a MB."""

    level: int = 17
    frame_bytes: int = 2 * MIB
    content_bytes_max: int = 256 * MIB

    def __post_init__(self) -> None:
        if not LEVEL_MIN <= self.level <= LEVEL_MAX:
            raise BadInput(f"export_level must be {LEVEL_MIN} to {LEVEL_MAX}, not {self.level}")
        if not 0 < self.frame_bytes <= FRAME_RAW_BYTES_MAX:
            raise BadInput(f"export_frame_bytes must be 1 to {FRAME_RAW_BYTES_MAX}, not {self.frame_bytes}")


def worth_packing(contents: Mapping[str, int], policy: Packing) -> list[str]:
    """Return which layers to pack, of these sizes (id -> bytes of content): the smallest first, as many as the bound
    allows. Pure."""
    chosen, total = [], 0
    for layer_id, size in sorted(contents.items(), key=lambda item: (item[1], item[0])):
        total += size
        if total > policy.content_bytes_max:
            break
        chosen.append(layer_id)
    return chosen


class PackedBlobs(WrappedBlobs):
    """`inner` for a reader, with these layers in their packed form and no other. Writing goes to `inner`."""

    def __init__(self, inner: BlobStore, packed: BlobStore, layers: Collection[str]) -> None:
        super().__init__(inner)
        self._packed = packed
        self._layers = frozenset(layers)

    def _where(self, key: str) -> BlobStore:
        """Return the store that a key is read from. Raises NotFound for the form that is not to be seen."""
        ref = id_of(key)
        if ref is None or ref not in self._layers:
            return self._inner
        if key != recoded_key_of(ref):
            raise NotFound(f"no such blob: {key}", kind="blob", ref=key)
        return self._packed

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        return self._where(key).get(key, max_bytes=max_bytes)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self._where(key).get_range(key, offset, length)

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        return self._where(key).get_ranges(key, ranges)

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        return self._where(key).stat(key)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        with contextlib.suppress(NotFound):
            return self._where(key).exists(key)
        return False


def pack(
    blobs: BlobStore, packed: BlobStore, snapshot_id: str, policy: Packing, pool: WorkPool, *, tell: Tell,
    go_on: Callable[[], None] = lambda: None,
) -> PackedBlobs:  # fmt: skip
    """See that `packed` holds what is smaller than a snapshot's layers, its template's included; return how they look then.

    May be called again after anything. `go_on` is called before each frame and may raise to stop. Raises NotFound, Corrupt
    (of the layers themselves); a disk without room is no error: the layers then go as they are stored.
    """
    contents = _contents(blobs, snapshot_id)
    used = set()
    for layer_id in worth_packing(contents, policy):
        with contextlib.suppress(Unsupported, OutOfSpace):  # of an old version, that proves no other coding; no room
            if not (packed.touch(recoded_key_of(layer_id)) and _is_whole(packed, layer_id, go_on)):
                tell(f"packing {layer_id[:16]}, {format_bytes(contents[layer_id])} of pages")
                _pack_layer(blobs, packed, layer_id, policy, pool, go_on)
            if packed.stat(recoded_key_of(layer_id)).size_bytes < stored_form(blobs, layer_id).size_bytes:
                used.add(layer_id)
    return PackedBlobs(blobs, packed, used)


def _pack_layer(
    blobs: BlobStore, packed: BlobStore, layer_id: str, policy: Packing, pool: WorkPool, go_on: Callable[[], None]
) -> None:
    original = open_layer(blobs, layer_id, stored_form(blobs, layer_id).size_bytes)
    crash_point("packing.before_file")
    packed.put_stream(
        recoded_key_of(layer_id),
        lambda: recode(original, level=policy.level, frame_bytes=policy.frame_bytes, go_on=go_on, pool=pool),
    )
    crash_point("packing.before_check")
    if not _is_whole(packed, layer_id, go_on):
        raise Corrupt(f"{layer_id} was packed and does not read back", blob=layer_id, hint="is this disk sound?")


def _is_whole(packed: BlobStore, layer_id: str, go_on: Callable[[], None]) -> bool:
    """Read a packed layer whole; one that is damaged goes. Every time: it may be of a process that died before it had."""
    try:
        read_back(packed, layer_id, go_on)
    except Corrupt:
        packed.delete(recoded_key_of(layer_id))
        return False
    return True


def _contents(blobs: BlobStore, snapshot_id: str) -> dict[str, int]:
    """Return the size of the content of each layer that a snapshot or its template names."""
    out: dict[str, int] = {}
    for item in closure(blobs, snapshot_id):
        if item.is_manifest:
            manifest, _ = sized_manifest(blobs, str(id_of(item.key)))
            out |= {file.id: file.entries * PAGE_BYTES for file in manifest.layers}
    return out


def as_announced(blobs: BlobStore, packed: BlobStore, head: Announcement) -> PackedBlobs:
    """Return the store that an announced archive is read from: the packed layers where it announces those."""
    used = [str(id_of(item.key)) for item in head.items if _is_packed(packed, item)]
    return PackedBlobs(blobs, packed, used)


def _is_packed(packed: BlobStore, item: Item) -> bool:
    ref = id_of(item.key)
    if ref is None or not is_id(ref, LAYER) or item.key != recoded_key_of(ref) or not packed.exists(item.key):
        return False
    return packed.stat(item.key).size_bytes == item.size_bytes  # else it is the node's own recoded form that is meant
