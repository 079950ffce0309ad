"""Bringing a snapshot from one blob store to another: push and pull are the same act, with the ends exchanged.

What travels is the closure of a manifest: its files, its template's files and manifest, itself last. A blob that is
there already does not travel; so an interrupted transfer, begun again, goes on where it was (to the blob), and a second
snapshot of one machine costs its new layer. Every blob is checked against its name while it streams.

Crash-safe by order: a manifest is put after all it names, the snapshot's own last of all. What a crash leaves at the
other end are files that nothing names, which that store's collector removes after its grace period. A transfer may take
longer than that grace period: so what was found or put is renewed once more, and put again if it was swept, directly
before the manifest. This module must know no addresses, names or catalogs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from recess.blobs import BlobStore, read_pieces
from recess.crashpoints import crash_point
from recess.errors import Corrupt, NotFound
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.forms import stored_form
from recess.snapshots.keys import SNAPSHOT, id_of, key_of, keys_of
from recess.snapshots.manifest_v1 import MANIFEST_BYTES_MAX, ManifestV1, decode_manifest
from recess.units import format_bytes

TEMPLATES_MAX = 8
"""How deep templates may stand on templates: one today; the cap is for manifests from strangers."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """One blob of a snapshot."""

    key: str
    size_bytes: int

    @property
    def is_manifest(self) -> bool:
        """Tell whether it commits what comes before it."""
        return str(id_of(self.key)).startswith(f"{SNAPSHOT}_")


@dataclass(frozen=True)
class TransferReport:
    """What a transfer moved, and what was there already."""

    blobs_sent: int
    bytes_sent: int
    blobs_there: int
    bytes_there: int


def closure(blobs: BlobStore, snapshot_id: str) -> list[Item]:
    """Return everything a snapshot needs, in the order in which it may be stored. Raises NotFound, Corrupt, ..."""
    chain: list[list[Item]] = []
    seen: set[str] = set()
    while snapshot_id:
        if snapshot_id in seen or len(chain) > TEMPLATES_MAX:
            raise Corrupt(f"snapshot {snapshot_id[:16]} stands on too many templates", blob=snapshot_id)
        seen.add(snapshot_id)
        manifest, size = sized_manifest(blobs, snapshot_id)
        files = {file.id: Item(key_of(file.id), file.bytes) for file in manifest.pagemaps}
        files[manifest.vmstate.id] = Item(key_of(manifest.vmstate.id), manifest.vmstate.bytes)
        files |= {file.id: _layer_item(blobs, file.id, file.bytes) for file in manifest.layers}
        chain.append([files[ref] for ref in sorted(files)] + [Item(key_of(snapshot_id), size)])
        snapshot_id = manifest.template
    ordered = [item for items in reversed(chain) for item in items]
    return list(dict.fromkeys(ordered))  # a file may serve both the template and the snapshot


def _layer_item(blobs: BlobStore, layer_id: str, size_bytes: int) -> Item:
    """Return a layer in the form that is there; in the usual one if none is, and who reads it will say so."""
    try:
        found = stored_form(blobs, layer_id)
    except NotFound:
        return Item(key_of(layer_id), size_bytes)
    return Item(found.key, size_bytes if found.key == key_of(layer_id) else found.size_bytes)


def sized_manifest(blobs: BlobStore, snapshot_id: str) -> tuple[ManifestV1, int]:
    """Return a verified manifest and its size in bytes. Raises NotFound, Corrupt, Incompatible, BadInput."""
    try:
        data = blobs.get(key_of(snapshot_id), max_bytes=MANIFEST_BYTES_MAX)
    except NotFound:
        raise NotFound(f"no such snapshot: {snapshot_id}", kind="snapshot", ref=snapshot_id) from None
    return decode_manifest(snapshot_id, data), len(data)


def copy_snapshot(source: BlobStore, target: BlobStore, snapshot_id: str, *, tell: Tell) -> TransferReport:
    """Copy what is missing at `target`; the snapshot exists there when this returns. May be called again after any error.

    `tell` gets a line of progress per blob. The caller keeps the collector of `target` away from what arrives, or trusts
    its grace period. Raises NotFound, Corrupt (names the blob, at either end), OutOfSpace, Unavailable.
    """
    items = closure(source, snapshot_id)
    todo = [item for item in items if not present(target, item)]
    sent: dict[Item, None] = {}
    total, done = format_bytes(_bytes(todo)), 0
    for item in todo:
        if item == items[-1]:
            _renew(source, target, items[:-1], sent)
            crash_point("transfer.before_manifest")
        tell(f"copying {len(todo)} blobs: {format_bytes(done)} of {total}")
        _copy(source, target, item)
        sent[item] = None
        done += item.size_bytes
    known = [item for item in items if item not in sent]
    return TransferReport(len(sent), _bytes(sent), len(known), _bytes(known))


def present(target: BlobStore, item: Item) -> bool:
    """Tell whether a store has a blob, a layer in either form, and renew its time. Raises Corrupt if it has another of
    that name."""
    if not target.touch(item.key):
        return _touch_other(target, item)
    found = target.stat(item.key).size_bytes
    if found != item.size_bytes:
        raise Corrupt(
            f"the other store's {item.key} has {found} bytes, not {item.size_bytes}",
            hint="it is damaged there: delete that object, then try again",
            blob=str(id_of(item.key)),
        )
    return True


def _touch_other(target: BlobStore, item: Item) -> bool:
    """Renew the form of a layer that does not travel, if it is there: it serves as well."""
    ref = id_of(item.key)
    return ref is not None and any(target.touch(key) for key in keys_of(ref) if key != item.key)


def _renew(source: BlobStore, target: BlobStore, items: Sequence[Item], sent: dict[Item, None]) -> None:
    for item in items:
        if not target.touch(item.key) and not _touch_other(target, item):
            _copy(source, target, item)
            sent[item] = None


def _copy(source: BlobStore, target: BlobStore, item: Item) -> None:
    crash_point("transfer.before_blob")
    target.put_stream(item.key, partial(checked_blob, source, item))
    if target.stat(item.key).size_bytes != item.size_bytes:
        raise Corrupt(f"{item.key} arrived with another size", blob=str(id_of(item.key)))


def checked_blob(blobs: BlobStore, item: Item) -> Iterator[bytes]:
    """Yield a stored blob piece by piece, checked against its key. Raises Corrupt at the latest at its end."""
    read = partial(blobs.get_range, item.key)
    return checked_pieces(item.key, item.size_bytes, read, read_pieces(blobs, item.key, item.size_bytes))


def check_there(blobs: BlobStore, snapshot_id: str) -> int:
    """Read a snapshot back from a store and check every blob against its name; return the bytes read. Raises Corrupt."""
    total = 0
    for item in closure(blobs, snapshot_id):
        total += sum(len(piece) for piece in checked_blob(blobs, item))
    return total


def _bytes(items: Iterable[Item]) -> int:
    return sum(item.size_bytes for item in items)
