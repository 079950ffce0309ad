"""Snapshots to and from elsewhere: push, pull, export, import, and finding one that another home put into a shared store.

Each is: bytes first (`snapshots.transfer`, `snapshots.archive`), then everything read back as a restore would, then the
row. What fails before the row leaves blobs that nothing names. All of it may be begun again after any failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blake3 import blake3

from recess.blobs import BlobStore, LocalBlobs
from recess.catalog import Catalog
from recess.catalog.names import check_name
from recess.catalog.snapshots import SnapshotRecord
from recess.clock import Clock
from recess.config import Config
from recess.errors import BadInput, NotFound, RecessError, Refused, Unavailable
from recess.frames import WorkPool
from recess.machines.arrivals import add_foreign, asks_for, foreign_record
from recess.machines.parts import ImageFiles, Progress
from recess.node.stores import home_id, open_blobs
from recess.node.travelfiles import TravelFiles, check_file
from recess.snapshots.archive import Import, announce, archive_bytes, archive_pieces
from recess.snapshots.archive_v1 import Announcement, ArchiveReader, Read, encode_announcement
from recess.snapshots.keys import SNAPSHOT
from recess.snapshots.packing import Packing, as_announced, pack
from recess.snapshots.shared import RefKeepingBlobs, Refs, SharedStore
from recess.snapshots.store import Store
from recess.snapshots.transfer import TransferReport, check_there, closure, copy_snapshot

PACKED_KEPT_S = 86400.0
_PACKING_NICE = 5  # somebody waits for it, but machines go first


class Transfers:
    """The gate between this node's store and others."""

    def __init__(
        self, config: Config, catalog: Catalog, store: Store, images: ImageFiles, clock: Clock, progress: Progress,
        free_bytes: Callable[[], int],
    ) -> None:  # fmt: skip
        self._config = config
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._progress = progress
        self._free_bytes = free_bytes
        self._files = TravelFiles(config.images_dir, images, progress)
        self._packing = Packing(config.export_level, config.export_frame_bytes)
        self._packs = threading.Lock()  # one archive is packed at a time; the next finds what it needs, perhaps
        self._stopped = threading.Event()

    # --- push and pull -------------------------------------------------------------------------------------------

    async def push(self, ref: str, address: str, *, check: bool, with_image: bool = False) -> dict[str, Any]:
        """Copy a snapshot to another store, where it can be found by its id and its name. `check`: read it all back;
        `with_image`: the root image and the kernel go along.

        Raises NotFound, BadInput, Unavailable, Corrupt, OutOfSpace.
        """
        row = await self._catalog.snapshots.get(ref)
        where = self._address(address)
        report, checked = await asyncio.to_thread(self._push, row, where, check, with_image)
        return {"snapshot": row.id, "name": row.name, "remote": where, "checked_bytes": checked, **asdict(report)}

    def _push(self, row: SnapshotRecord, where: str, check: bool, with_image: bool) -> tuple[TransferReport, int]:
        remote, refs = self._remote(where)
        refs.hold(row.id)  # first: its manifest may be there, from another home that is about to let go of it
        if with_image:
            self._files.pack(self._store.manifest(row.id), remote)
        if where == self._config.store:  # it is there already: what is left is to publish its name
            items = closure(self._store.blobs, row.id)
            report = TransferReport(0, 0, len(items), sum(item.size_bytes for item in items))
        else:
            report = copy_snapshot(self._store.blobs, RefKeepingBlobs(remote, refs), row.id, tell=self._progress)
        if row.name:
            refs.give_name(row.name, row.id, self._clock.wall_s())
        return report, check_there(remote, row.id) if check else 0

    async def pull(self, ref: str, address: str, *, name: str) -> dict[str, Any]:
        """Copy a snapshot from another store and give it a row. Raises NotFound, Unavailable, Corrupt, OutOfSpace."""
        where = self._address(address)
        if name:
            check_name(name, "snapshot", tagged=True)
        snapshot_id, report = await asyncio.to_thread(self._pull, ref, where)
        await self._prove(snapshot_id, trust=True)  # the store was named by this node's owner
        known_as = "" if ref.startswith(f"{SNAPSHOT}_") else ref
        called = await self._add(snapshot_id, "pulled", report.bytes_sent, name, known_as)
        missing = await self._lacks(snapshot_id)
        return {"snapshot": snapshot_id, "name": called, "remote": where, "missing": missing, **asdict(report)}

    async def _lacks(self, snapshot_id: str) -> str:
        return await self._files.missing(await asyncio.to_thread(self._store.manifest, snapshot_id))

    def _pull(self, ref: str, where: str) -> tuple[str, TransferReport]:
        if where.startswith("/") and not Path(where).is_dir():
            raise NotFound(f"no such folder: {where}", kind="store", ref=where)
        remote, refs = self._remote(where)
        snapshot_id = _find(remote, refs, ref)
        with self._store.holding(item.key for item in closure(remote, snapshot_id)):
            report = copy_snapshot(remote, self._store.blobs, snapshot_id, tell=self._progress)
            self._files.unpack(self._store.manifest(snapshot_id), remote)
            return snapshot_id, report

    async def _prove(self, snapshot_id: str, *, trust: bool) -> list[str]:
        """Read everything as a restore would, and see what it asks for; what does not hold is not kept.

        Its manifest was put or renewed a moment ago: no collector takes it before its row is there.
        """
        self._progress("checking every page")
        try:
            await asyncio.to_thread(self._store.verify, snapshot_id)
            asks = asks_for(await asyncio.to_thread(self._store.manifest, snapshot_id), snapshot_id)
            if asks and not trust:
                raise Refused(
                    f"a machine restored from this archive could {'; '.join(asks[:8])}",
                    hint="if you know where it comes from, import it with --trust", asks_for=asks,
                )  # fmt: skip
        except RecessError:
            if await self._catalog.snapshots.find(snapshot_id) is None:
                with contextlib.suppress(
                    RecessError
                ):  # what cannot be removed now is the collector's; the first error is the news
                    await asyncio.to_thread(self._store.discard, snapshot_id)
            raise
        return asks

    def _address(self, address: str) -> str:
        found = address or self._config.remote or self._config.store
        if not found:
            raise BadInput("no remote store is named", hint="give --remote s3://BUCKET/PREFIX, or set RECESS_REMOTE")
        return found

    def _remote(self, where: str) -> tuple[BlobStore, Refs]:
        remote = open_blobs(where, self._config)
        return remote, Refs(remote, home_id(self._config.home))

    async def _add(self, snapshot_id: str, how: str, new_bytes: int, name: str, known_as: str) -> str:
        manifest = await asyncio.to_thread(self._hold, snapshot_id)
        record = foreign_record(manifest, snapshot_id, how, new_bytes)
        now = self._clock.wall_s()
        return await add_foreign(self._catalog, record, wanted=name, known_as=known_as, now=now)

    def _hold(self, snapshot_id: str) -> Mapping[str, Any]:
        """Return the manifest; from now on no home's collector takes it (NotFound: one just had)."""
        if isinstance(self._store, SharedStore):
            self._store.refs.hold(snapshot_id)
        return self._store.manifest(snapshot_id)

    # --- export and import ---------------------------------------------------------------------------------------

    async def announce(
        self, ref: str, *, with_image: bool = False, as_stored: bool = False
    ) -> tuple[Announcement, int, str]:
        """Return what an archive would hold, its size, and a tag that tells one archive's bytes from another's.

        Its size must be known before it is sent, so its layers (unless they go `as_stored`) and the image's files are
        packed now, and kept for a day. Raises NotFound, Corrupt, Unavailable (the server ends).
        """
        row = await self._catalog.snapshots.get(ref)
        head = await asyncio.to_thread(self._announce, row, with_image, as_stored)
        return head, archive_bytes(head), blake3(encode_announcement(head)).hexdigest(16)

    def _announce(self, row: SnapshotRecord, with_image: bool, as_stored: bool) -> Announcement:
        blobs = self._store.blobs
        self.drop_packed()
        files = self._files.pack(self._store.manifest(row.id), blobs) if with_image else []
        return announce(blobs if as_stored else self._pack(row.id), row.id, row.name, files)

    def _pack(self, snapshot_id: str) -> BlobStore:
        def go_on() -> None:
            if self._stopped.is_set():
                raise Unavailable("the server ends", hint="try again: what was packed is kept")

        with self._packs, contextlib.closing(WorkPool(name="packing", nice=_PACKING_NICE)) as pool:
            return pack(
                self._store.blobs, LocalBlobs(self._config.packed_dir), snapshot_id, self._packing, pool,
                tell=self._progress, go_on=go_on,
            )  # fmt: skip

    def stop(self) -> None:
        """Give up what is being packed. May be called twice."""
        self._stopped.set()

    def drop_packed(self, *, everything: bool = False) -> int:
        """Remove what exports packed, and image files of an import that broke off, a day ago (or at any time); return the
        bytes freed. An export that is under way then breaks off, and goes on when it is asked for again."""
        before_s, freed = self._clock.wall_s() - PACKED_KEPT_S, 0
        places: list[tuple[BlobStore, str]] = []
        if self._config.packed_dir.is_dir():
            places.append((LocalBlobs(self._config.packed_dir), ""))
            places[0][0].clean(before_s=before_s)  # what a crash left half-written
        if not isinstance(self._store, SharedStore):  # there others may want them
            places.append((self._store.blobs, "files/"))
        for blobs, prefix in places:
            for old in [info for info in blobs.list_blobs(prefix) if everything or info.modified_s < before_s]:
                freed += old.size_bytes if blobs.delete(old.key) else 0
        return freed

    def pieces(self, head: Announcement, start: int) -> Iterator[bytes]:
        """Yield the archive from a byte on. Blocks: for a thread."""
        blobs = self._store.blobs
        if self._config.packed_dir.is_dir():  # not made here: a full disk must not keep an export from going as stored
            blobs = as_announced(blobs, LocalBlobs(self._config.packed_dir), head)
        return archive_pieces(blobs, head, start=start)

    async def take_in(self, read: Read, *, name: str, trust: bool) -> dict[str, Any]:
        """Import an archive; `read` is called from a thread. Raises Corrupt, OutOfSpace; Refused if a machine restored
        from it could reach out or use a secret, and `trust` was not given."""
        if name:
            check_name(name, "snapshot", tagged=True)
        head, report = await asyncio.to_thread(self._take_in, read)
        asks = await self._prove(head.snapshot_id, trust=trust)
        called = await self._add(head.snapshot_id, "imported", report.bytes_sent, name, _legal(head.name))
        missing = await self._lacks(head.snapshot_id)
        return {"snapshot": head.snapshot_id, "name": called, "asks_for": asks, "missing": missing, **asdict(report)}

    def _take_in(self, read: Read) -> tuple[Announcement, TransferReport]:
        blobs = self._store.blobs
        self.drop_packed()
        work = Import(blobs, ArchiveReader(read), self._config.home, self._free_bytes, check_file)
        with self._store.holding(item.key for item in work.announcement.items):
            report = work.run(tell=self._progress)
            self._files.unpack(self._store.manifest(work.announcement.snapshot_id), blobs)
        if not isinstance(self._store, SharedStore):  # there others may want them
            for item in work.announcement.files.values():
                blobs.delete(item.key)
        return work.announcement, report

    # --- a shared store ------------------------------------------------------------------------------------------

    async def find(self, ref: str) -> SnapshotRecord:
        """Take over a snapshot that another home put into this node's shared store. Raises NotFound, BadInput."""
        store = self._store
        if not isinstance(store, SharedStore):
            raise NotFound(
                f"no such snapshot: {ref}",
                hint="list what there is with `recess snapshots ls`",
                kind="snapshot",
                ref=ref,
            )
        snapshot_id = await asyncio.to_thread(store.find, ref)
        await asyncio.to_thread(self._unpack_found, snapshot_id)
        self._progress(f"{ref} is another home's: found in {self._config.store}")
        await self._add(snapshot_id, "found", 0, "", "" if ref.startswith(f"{SNAPSHOT}_") else ref)
        return await self._catalog.snapshots.get(snapshot_id)

    def _unpack_found(self, snapshot_id: str) -> None:
        self._files.unpack(self._hold(snapshot_id), self._store.blobs)


def _find(remote: BlobStore, refs: Refs, ref: str) -> str:
    """Return the id of a snapshot in another store, by name, id or prefix of an id."""
    store = SharedStore(remote, refs.owner, threads=1)
    try:
        return store.find(ref)
    finally:
        store.close()


def _legal(name: str) -> str:
    """Return a name from an archive if it can be one here, else nothing: it is a stranger's."""
    try:
        return check_name(name, "snapshot", tagged=True) if name else ""
    except BadInput:
        return ""
