"""The snapshot store: the contract's methods over a blob store, each a few lines over the modules that do the work."""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from recess.blobs import BlobStore
from recess.crashpoints import crash_point
from recess.errors import BadInput, Corrupt, Incompatible, NotFound, OutOfSpace, Unavailable
from recess.frames import FRAME_RAW_BYTES_MAX, LEVEL_MAX, LEVEL_MIN, WorkPool
from recess.frames.pool import give_way
from recess.snapshots.classify import words
from recess.snapshots.contract import (
    Overlay,
    PageData,
    PageSource,
    PartDiff,
    RawPart,
    SnapshotMeta,
    TemplatePages,
    WriteReport,
)
from recess.snapshots.difference import Side, difference
from recess.snapshots.forms import recoded_sizes
from recess.snapshots.joining import Joiner
from recess.snapshots.keys import FOLDERS, SNAPSHOT, id_of, key_of
from recess.snapshots.lineage import Shape, dependents, shape_of
from recess.snapshots.manifest_v1 import ManifestV1
from recess.snapshots.publish import Pins
from recess.snapshots.reader import OpenSnapshot, by_hash, read_manifest
from recess.snapshots.recall import Recall
from recess.snapshots.recompress import Stopped, recompress
from recess.snapshots.recompression import Recompression
from recess.snapshots.sweep import collect, discard
from recess.snapshots.writer import SnapshotWriter
from recess.units import KIB, PAGE_BYTES

_MATERIALISE_PAGES = 4096  # 16 MiB in memory at a time
_PUT_THREADS = 3  # files of one snapshot that are fsynced at once


class Store:
    """Snapshots over `blobs`; fulfils `SnapshotStore`. Safe to use from several threads.

    Two stores over one set of blobs may read and write at once; only one of them may `collect`, and its grace period
    must be longer than a write of the other. `frame_bytes`: content of a layer's frame, whole pages; `level`: zstd's.
    """

    def __init__(self, blobs: BlobStore, *, frame_bytes: int = 64 * KIB, level: int = 1, threads: int = 2) -> None:
        if not PAGE_BYTES <= frame_bytes <= FRAME_RAW_BYTES_MAX or frame_bytes % PAGE_BYTES:
            raise BadInput(f"frame_bytes must be whole pages, {PAGE_BYTES} to {FRAME_RAW_BYTES_MAX}, not {frame_bytes}")
        if not LEVEL_MIN <= level <= LEVEL_MAX:
            raise BadInput(f"zstd_level must be {LEVEL_MIN} to {LEVEL_MAX}, not {level}")
        self._blobs = blobs
        self._frame_bytes = frame_bytes
        self._level = level
        self._pool = WorkPool(threads)
        self._io = ThreadPoolExecutor(_PUT_THREADS, thread_name_prefix="snapshot-put")
        self._pins = Pins()
        self._recall = Recall()
        self._joiner = Joiner(blobs, self._pins, self._recall, frame_bytes=frame_bytes, level=level)
        self._recompressing = threading.Lock()
        self._vain: set[str] = set()  # layers that would not become smaller

    @property
    def blobs(self) -> BlobStore:
        """The bytes beneath, for transfers."""
        return self._blobs

    @contextmanager
    def holding(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep blobs that arrive from elsewhere from being swept before the manifest that names them is there."""
        held = list(keys)
        self._pins.hold(held)
        try:
            yield
        finally:
            self._pins.release(held)

    def fetch_bytes(self, snapshot_id: str) -> int:
        """See `SnapshotStore.fetch_bytes`."""
        return 0

    def close(self) -> None:
        """End the store's threads. May be called twice."""
        self._joiner.close()
        self._io.shutdown()
        self._pool.close()

    def write(
        self,
        parts: list[RawPart],
        vmstate: bytes,
        meta: SnapshotMeta,
        *,
        template: TemplatePages | None = None,
        parent_id: str = "",
        sources: list[PageSource] | None = None,
    ) -> WriteReport:
        """See `SnapshotStore.write`."""
        writer = SnapshotWriter(
            self._blobs, self._pins, self._pool, self._io, self._recall, self._joiner,
            frame_bytes=self._frame_bytes, level=self._level,
        )  # fmt: skip
        with self._joiner.standing_still():
            report = writer.write(parts, vmstate, meta, template=template, parent_id=parent_id, sources=sources or [])
        self._joiner.consider(report.snapshot_id)
        return report

    def giving_way(self) -> AbstractContextManager[None]:
        """See `SnapshotStore.giving_way`."""
        return self._joiner.standing_still()

    def settle(self) -> None:
        """Wait until no old layers are being joined any more (`joining`). Nobody needs to; what comes of it is then there."""
        self._joiner.settle()

    def manifest(self, snapshot_id: str) -> Mapping[str, Any]:
        """See `SnapshotStore.manifest`."""
        found: dict[str, Any] = msgspec.to_builtins(self._manifest(snapshot_id))
        return found

    def _manifest(self, snapshot_id: str) -> ManifestV1:
        return read_manifest(self._blobs, snapshot_id)

    def _open(self, snapshot_id: str) -> OpenSnapshot:
        return OpenSnapshot(self._blobs, snapshot_id, self._pool)

    def _open_sparing(self, snapshot_id: str) -> OpenSnapshot:
        """Open a snapshot of which little will be read; here the same."""
        return self._open(snapshot_id)

    def list_ids(self) -> list[str]:
        """Return the ids of all stored manifests, also of those that no row names."""
        found = (id_of(info.key) for info in self._blobs.list_blobs(FOLDERS[0]))
        return sorted(ref for ref in found if ref is not None)

    def resolve(self, ref: str) -> str:
        """Return the whole id for an unambiguous prefix of one (with `snp_`). Raises NotFound, BadInput."""
        matches = [full for full in self.list_ids() if full.startswith(ref)] if ref.startswith(f"{SNAPSHOT}_") else []
        if not matches:
            raise NotFound(
                f"no such snapshot: {ref}",
                hint="list what there is with `recess snapshots ls`",
                kind="snapshot",
                ref=ref,
            )
        if len(matches) > 1:
            raise BadInput(f"{ref} is the start of {len(matches)} snapshots", hint="write more of it")
        return matches[0]

    def overlay(
        self, snapshot_id: str, part: str, *, template: TemplatePages | None, sources: list[PageSource] | None = None,
        sparing: bool = False,
    ) -> Overlay:  # fmt: skip
        """See `SnapshotStore.overlay`."""
        snapshot = self._open_sparing(snapshot_id) if sparing else self._open(snapshot_id)
        _check_template(snapshot, template)
        page_map = snapshot.page_map(part)
        return Overlay(page_map.pages, snapshot.read_pages(page_map, by_hash(sources)))

    def vmstate(self, snapshot_id: str) -> bytes:
        """See `SnapshotStore.vmstate`."""
        return self._open(snapshot_id).vmstate()

    def materialise(
        self,
        snapshot_id: str,
        part: str,
        target: Path,
        *,
        template: TemplatePages | None = None,
        sources: list[PageSource] | None = None,
    ) -> None:
        """See `SnapshotStore.materialise`. Holes stay holes; an error or a crash leaves `target` as it was."""
        snapshot = self._open(snapshot_id)
        _check_template(snapshot, template)
        base = template.part(part) if template is not None else None
        temp = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write_part(fd, snapshot, part, base, by_hash(sources))
                os.fsync(fd)
            finally:
                os.close(fd)
            crash_point("snapshot.before_materialised")
            temp.replace(target)
        except OSError as exc:
            temp.unlink(missing_ok=True)
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(f"no space to unpack {part} of {snapshot_id[:16]} to {target}") from exc
            raise Unavailable(f"cannot unpack {part} of {snapshot_id[:16]} to {target}: {exc.strerror}") from exc
        except (Exception, KeyboardInterrupt):
            temp.unlink(missing_ok=True)
            raise

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
        sides = []
        for ref, template in zip((left_id, right_id), templates, strict=True):
            snapshot = self._open(ref)
            _check_template(snapshot, template)
            sides.append(Side(snapshot, template.part(part) if template is not None else None))
        return difference(sides[0], sides[1], part, by_hash(sources))

    def verify(self, snapshot_id: str) -> Mapping[str, Any]:
        """See `SnapshotStore.verify`. The template's files are verified too."""
        counts = {"manifests": 0, "files": 0, "bytes": 0, "pages": 0}
        seen: set[str] = set()
        while snapshot_id and snapshot_id not in seen:
            seen.add(snapshot_id)
            snapshot = self._open(snapshot_id)
            for name, count in snapshot.verify().items():
                counts[name] += count
            counts["manifests"] += 1
            snapshot_id = snapshot.manifest.template
        return counts

    def shapes(self, ids: Iterable[str]) -> dict[str, Shape]:
        """Return what each of these manifests says about bytes; those that cannot be read are left out."""
        out, recoded = {}, recoded_sizes(self._blobs)
        for snapshot_id in ids:
            try:
                info = self._blobs.stat(key_of(snapshot_id))
                out[snapshot_id] = shape_of(snapshot_id, self._manifest(snapshot_id), info.size_bytes, recoded)
            except (NotFound, Corrupt, Incompatible, BadInput):
                continue
        return out

    def dependents(self, snapshot_id: str, all_ids: list[str]) -> list[str]:
        """See `SnapshotStore.dependents`."""
        return dependents(snapshot_id, self.shapes({snapshot_id, *all_ids}))

    def discard(self, snapshot_id: str) -> Mapping[str, int]:
        """See `SnapshotStore.discard`."""
        return discard(self._blobs, self._pins, snapshot_id)

    def collect(
        self, live_ids: list[str], *, grace_s: float, now: float, wanted: Iterable[str] = ()
    ) -> Mapping[str, int]:
        """See `SnapshotStore.collect`. Returns counts: manifests, files, leftovers, bytes."""
        self._joiner.forget_old(now - grace_s)
        return collect(self._blobs, self._pins, live_ids, grace_s=grace_s, now=now, wanted=wanted)

    def recompress(
        self, policy: Recompression, *, now: float, stopped: Callable[[], bool], tell: Callable[[str], None]
    ) -> Mapping[str, int]:
        """See `SnapshotStore.recompress`."""

        def go_on() -> None:
            if stopped():
                raise Stopped

        def work() -> dict[str, int]:
            until = time.monotonic() + policy.budget_s
            return recompress(
                self._blobs, self._pins, policy, now=now, go_on=go_on, tell=tell,
                more=lambda: not stopped() and time.monotonic() < until, vain=self._vain,
            )  # fmt: skip

        # A thread of its own: a thread's priority can be lowered, but not raised again.
        with self._recompressing, ThreadPoolExecutor(1, "recompress", initializer=give_way) as thread:
            return thread.submit(work).result()

    def used_bytes(self) -> int:
        """Return the bytes of everything stored. Costs a listing."""
        return sum(info.size_bytes for folder in FOLDERS for info in self._blobs.list_blobs(folder))


def _check_template(snapshot: OpenSnapshot, template: TemplatePages | None) -> None:
    """Raise Incompatible unless the template is the one that the snapshot's gaps mean."""
    wanted, given = snapshot.manifest.template, template.template_id if template is not None else ""
    if wanted != given:
        reason = f"it was taken over template {wanted[:16] or 'none'}, not {given[:16] or 'none'}"
        raise Incompatible(f"snapshot {snapshot.id[:16]}: {reason}", reasons=[reason])


def _write_part(
    fd: int, snapshot: OpenSnapshot, part: str, base: PageData | None, sources: Mapping[str, PageSource]
) -> None:
    """Write a part into an empty file, a stretch at a time; pages of zeros are left out."""
    page_map = snapshot.page_map(part)
    if base is not None and len(base) != page_map.pages_total:
        raise Incompatible(f"snapshot {snapshot.id[:16]}: the template's {part} has another size", reasons=["size"])
    os.ftruncate(fd, page_map.pages_total * PAGE_BYTES)
    for low in range(0, page_map.pages_total, _MATERIALISE_PAGES):
        high = min(low + _MATERIALISE_PAGES, page_map.pages_total)
        piece = page_map.between(low, high)
        if base is None and not piece.count:
            continue
        pages = np.zeros((high - low, PAGE_BYTES), np.uint8) if base is None else base[low:high].copy()
        pages[piece.pages - np.uint32(low)] = snapshot.read_pages(piece, sources)
        used = np.flatnonzero(words(pages).any(axis=1))
        for run in np.split(used, np.flatnonzero(np.diff(used) != 1) + 1):
            if len(run):
                _write_all(fd, pages[run[0] : run[-1] + 1].data.cast("B"), (low + int(run[0])) * PAGE_BYTES)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
