"""Snapshots in a store that several homes share: who still needs what, said in the store itself.

    refs/OWNER/snp_<hash>             empty: the home OWNER has this snapshot
    names/<hash of the name>/<ms>_snp_<hash>    the name's text: that snapshot was given this name then; the newest counts

A home knows its own rows only, so it must not sweep by them alone. Each home's reference is put **before** its manifest
(or before it takes over another's), and every collector keeps what any home refers to. A reference without a manifest is
harmless; so is one that a crash left. A home that is gone for ever keeps its snapshots until somebody deletes its
`refs/OWNER/`: that is never done by itself.

What deletes is one process per home, after a grace period that must be longer than any write or transfer, and than the
lag of the store's listings. Names here are for finding a snapshot from another home; what a name means at home is its
catalog's business. This module must know no addresses and no catalog.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from blake3 import blake3

from recess.blobs import BlobStore, CachingBlobs, SparingBlobs, WrappedBlobs
from recess.blobs.contract import Bytes, PieceSource, pieces
from recess.errors import BadInput, Corrupt, NotFound
from recess.snapshots.contract import Overlay, PageSource, PartDiff, TemplatePages
from recess.snapshots.keys import SNAPSHOT, id_of, is_id, is_layer_key, key_of, keys_of
from recess.snapshots.manifest_v1 import decode_manifest
from recess.snapshots.reader import OpenSnapshot
from recess.snapshots.recompression import Recompression
from recess.snapshots.store import Store
from recess.units import KIB

_OWNER = re.compile(r"[a-z0-9]{8,64}")
_FILE_ID = re.compile(r"(?:snp|lyr|pmp|vms)_[0-9a-f]{64}")
T = TypeVar("T")


class Refs:
    """The references and names in one store, as the home `owner` (small letters and digits) sees them."""

    def __init__(self, blobs: BlobStore, owner: str) -> None:
        if _OWNER.fullmatch(owner) is None:
            raise BadInput(f"not the id of a home: {owner[:80]!r}")
        self._blobs = blobs
        self.owner = owner

    def hold(self, snapshot_id: str) -> None:
        """Say that this home has, or is about to have, a snapshot. May be called twice."""
        self._blobs.put(self._key(snapshot_id), b"")

    def drop(self, snapshot_id: str) -> None:
        """Say that this home needs it no more."""
        self._blobs.delete(self._key(snapshot_id))

    def _key(self, snapshot_id: str) -> str:
        return f"refs/{self.owner}/{snapshot_id}"

    def bring_up_to_date(self, live: Iterable[str], wanted: Iterable[str], *, before_s: float) -> int:
        """Refer to all of `live`; drop own references, older than a wall time, to what is in neither; return how many."""
        needed = {self._key(snapshot_id) for snapshot_id in live}
        keep = needed.union(self._key(snapshot_id) for snapshot_id in wanted)
        found = {info.key: info.modified_s for info in self._blobs.list_blobs(f"refs/{self.owner}/")}
        for key in sorted(needed - found.keys()):  # nothing loses them; but if anything did, others would delete
            self._blobs.put(key, b"")
        return sum(self._blobs.delete(key) for key, at in found.items() if key not in keep and at < before_s)

    def of_others(self) -> list[str]:
        """Return the ids of the snapshots that other homes refer to."""
        mine = f"refs/{self.owner}/"
        keys = (info.key for info in self._blobs.list_blobs("refs/") if not info.key.startswith(mine))
        found = {key.rpartition("/")[2] for key in keys}
        return sorted(ref for ref in found if is_id(ref, SNAPSHOT))

    def give_name(self, name: str, snapshot_id: str, at_s: float) -> None:
        """Let other homes find a snapshot by name; a later call for the name moves it."""
        self._blobs.put(f"{_names(name)}{int(at_s * 1000):015}_{snapshot_id}", name.encode())

    def find_name(self, name: str) -> str:
        """Return the id of the snapshot that was given this name last and is still there. Raises NotFound."""
        for key in sorted((info.key for info in self._blobs.list_blobs(_names(name))), reverse=True):
            snapshot_id = key.rpartition("/")[2].partition("_")[2]
            if is_id(snapshot_id, SNAPSHOT) and self._blobs.exists(key_of(snapshot_id)):
                return snapshot_id
        raise NotFound(
            f"no such snapshot in the store: {name}",
            hint="list what there is with `recess snapshots ls`",
            kind="snapshot",
            ref=name,
        )

    def drop_names(self, *, before_s: float) -> int:
        """Drop names, older than a wall time, of snapshots that are gone; return how many."""
        old = [info.key for info in self._blobs.list_blobs("names/") if info.modified_s < before_s]
        gone = [key for key in old if not self._is_there(key.rpartition("/")[2].partition("_")[2])]
        return sum(self._blobs.delete(key) for key in gone)

    def _is_there(self, snapshot_id: str) -> bool:
        return is_id(snapshot_id, SNAPSHOT) and self._blobs.exists(key_of(snapshot_id))


def _names(name: str) -> str:
    return f"names/{blake3(name.encode()).hexdigest()}/"


class RefKeepingBlobs(WrappedBlobs):
    """A store in which no manifest appears before this home's reference to it, and the name it was given at birth."""

    def __init__(self, inner: BlobStore, refs: Refs) -> None:
        super().__init__(inner)
        self._refs = refs

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        ref = self._hold(key)
        if ref:
            self._publish_name(ref, b"".join(pieces(data)))
        return super().put(key, data)

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`."""
        self._hold(key)
        return super().put_stream(key, source)

    def _hold(self, key: str) -> str:
        ref = id_of(key) or ""
        if not is_id(ref, SNAPSHOT):
            return ""
        self._refs.hold(ref)
        return ref

    def _publish_name(self, snapshot_id: str, data: bytes) -> None:
        """A name without a snapshot is found by nobody (`find_name`), so it may come first, too."""
        manifest = decode_manifest(snapshot_id, data)
        name = manifest.origin.get("name")
        if isinstance(name, str) and name:
            self._refs.give_name(name, snapshot_id, manifest.created_ms / 1000)


class SharedStore(Store):
    """A `Store` over a remote store that other homes use, too. `cache`: the copies on this node, if it keeps any."""

    def __init__(
        self,
        blobs: BlobStore,
        owner: str,
        *,
        cache: CachingBlobs | None = None,
        frame_bytes: int = 64 * KIB,
        level: int = 1,
        threads: int = 2,
    ) -> None:
        self.refs = Refs(blobs, owner)
        self._cache = cache
        super().__init__(RefKeepingBlobs(blobs, self.refs), frame_bytes=frame_bytes, level=level, threads=threads)

    def find(self, ref: str) -> str:
        """Return the id of a stored snapshot by name, id, or unambiguous prefix of an id. Raises NotFound, BadInput."""
        return self.resolve(ref) if ref.startswith(f"{SNAPSHOT}_") else self.refs.find_name(ref)

    def fetch_bytes(self, snapshot_id: str) -> int:
        """See `SnapshotStore.fetch_bytes`."""
        manifest = self._manifest(snapshot_id)  # read by now; and the template's files are mostly at hand, unpacked
        items = [(key_of(file.id), file.bytes) for file in (*manifest.layers, *manifest.pagemaps)]
        items.append((key_of(manifest.vmstate.id), manifest.vmstate.bytes))
        return sum(size for _, size in items) if self._cache is None else self._cache.missing_bytes(items)

    def discard(self, snapshot_id: str) -> Mapping[str, int]:
        """See `SnapshotStore.discard`: here only the reference goes, the bytes with the next sweep. Others write, too."""
        self.refs.drop(snapshot_id)
        return {"manifests": 0, "files": 0, "bytes": 0}

    def collect(
        self, live_ids: list[str], *, grace_s: float, now: float, wanted: Iterable[str] = ()
    ) -> Mapping[str, int]:
        """See `SnapshotStore.collect`. What other homes refer to stays.

        Their references are listed after the wish to delete was formed and before anything is: a manifest whose
        reference comes later than this listing is younger than the grace period.
        """
        wanted = list(wanted)
        self.refs.bring_up_to_date(live_ids, wanted, before_s=now - grace_s)
        counts = super().collect(live_ids, grace_s=grace_s, now=now, wanted=[*wanted, *self.refs.of_others()])
        self.refs.drop_names(before_s=now - grace_s)
        return counts

    def recompress(
        self, policy: Recompression, *, now: float, stopped: Callable[[], bool], tell: Callable[[str], None]
    ) -> Mapping[str, int]:
        """See `SnapshotStore.recompress`: never here. Reading it all back from afar would cost more than it saves, and
        another home may be of a version that knows only layers as they were written."""
        return {"recompressed": 0, "bytes": 0}

    # --- a damaged copy on this node is not the end of a snapshot ------------------------------------------------

    def overlay(
        self, snapshot_id: str, part: str, *, template: TemplatePages | None, sources: list[PageSource] | None = None,
        sparing: bool = False,
    ) -> Overlay:  # fmt: skip
        """See `SnapshotStore.overlay`."""
        read = super().overlay
        return self._healing(lambda: read(snapshot_id, part, template=template, sources=sources, sparing=sparing))

    def _open_sparing(self, snapshot_id: str) -> OpenSnapshot:
        blobs = self._blobs if self._cache is None else SparingBlobs(self._cache, is_layer_key)
        return OpenSnapshot(blobs, snapshot_id, self._pool, far=True)

    def difference(
        self,
        left_id: str,
        right_id: str,
        part: str,
        *,
        templates: tuple[TemplatePages | None, TemplatePages | None],
        sources: list[PageSource] | None = None,
    ) -> PartDiff:
        """See `SnapshotStore.difference`."""
        compare = super().difference
        return self._healing(lambda: compare(left_id, right_id, part, templates=templates, sources=sources))

    def vmstate(self, snapshot_id: str) -> bytes:
        """See `SnapshotStore.vmstate`."""
        return self._healing(lambda: super(SharedStore, self).vmstate(snapshot_id))

    def manifest(self, snapshot_id: str) -> Mapping[str, Any]:
        """See `SnapshotStore.manifest`."""
        return self._healing(lambda: super(SharedStore, self).manifest(snapshot_id))

    def verify(self, snapshot_id: str) -> Mapping[str, Any]:
        """See `SnapshotStore.verify`."""
        return self._healing(lambda: super(SharedStore, self).verify(snapshot_id))

    def _healing(self, read: Callable[[], T]) -> T:
        """Read; while what is damaged has a copy here, drop that copy and read again: the store may have it whole."""
        dropped: set[str] = set()
        while True:
            try:
                return read()
            except Corrupt as exc:
                found = _FILE_ID.search(str(exc.details.get("blob", "")))
                ref = found[0] if found is not None else ""
                if self._cache is None or not ref or ref in dropped or not _drop(self._cache, ref):
                    raise
                dropped.add(ref)  # once: bytes may be just what their hash says, and still make no sense


def _drop(cache: CachingBlobs, ref: str) -> bool:
    """Drop the copies of a thing, in whatever form; tell whether there was one."""
    return sum(cache.drop(key) for key in keys_of(ref)) > 0
