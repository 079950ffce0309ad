"""What goes into and comes out of the snapshot store (formats: docs/internals/snapshot-format.md).

The store turns raw pages into layers, page maps and a manifest, and back. It must never know of VMMs, guests,
sessions or names: a driver's fingerprint, a machine spec and provenance are opaque JSON to it, and so is the log
position. Everything here is synchronous and CPU- or disk-bound: async callers use a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recess.snapshots.lineage import Shape
from recess.snapshots.recompression import Recompression

PageIndices = NDArray[np.uint32]  # ascending page numbers
PageData = NDArray[np.uint8]  # shape (n, 4096), C-contiguous


@dataclass(frozen=True)
class RawPart:
    """Pages of one part as captured: those that may differ from the template (or from zeros without one).

    With `inherits` they are only those that may differ from the parent snapshot: every other page is the parent's.
    `zeros`: which of them (a mask) are known to be zeros: their data is not looked at.
    """

    name: str  # "memory", "disk0"
    pages_total: int
    indices: PageIndices
    data: PageData
    inherits: bool = False
    zeros: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class SnapshotMeta:
    """What a manifest records besides the parts. All JSON data; sizes in bytes, times in wall seconds."""

    fingerprint: Mapping[str, Any]
    spec: Mapping[str, Any]
    log_position: int = 0
    epoch: int = 0
    session: str = ""
    machine: str = ""
    why: str = "manual"  # manual | idle | fork | turn | template | stop
    origin: Mapping[str, Any] = field(default_factory=dict)  # who forked from whom
    forkable: bool = True  # False: guestd did not answer before the pause
    created: float = 0.0


class PageSource(Protocol):
    """A content-addressed file of 4 KiB blocks that every node has or can fetch (root image, kernel)."""

    @property
    def source_hash(self) -> str:
        """BLAKE3-256 hex of the whole file."""
        ...

    def lookup_many(self, pages: PageData) -> NDArray[np.int64]:
        """Return, per page, the number of a block with equal bytes (compared, not only hashed), or -1.

        Called from several threads at once, and with read-only pages.
        """
        ...

    def read_block(self, block: int) -> memoryview:
        """Return 4096 bytes; raises Corrupt if out of range."""
        ...


class TemplatePages(Protocol):
    """The pages of a template's part, in memory or in a mapped file."""

    @property
    def template_id(self) -> str:
        """The template's manifest id."""
        ...

    def part(self, name: str) -> PageData:
        """Return all pages of the part as a read-only (pages_total, 4096) array backed by a mapping."""
        ...

    def held(self, name: str) -> PageIndices:
        """Return the pages of the part that may be other than zeros: the rest need not be read to know."""
        ...


@dataclass(frozen=True)
class WriteReport:
    """What one snapshot cost. `new_bytes`: bytes this snapshot added to the store, all blobs counted.

    `pages_shared`: captured pages that cost nothing, by why: zero, template, parent, image and kernel (the first and
    the second of `sources`), duplicate (of another page of this snapshot); and `inherited`: pages that were not even
    captured, since nobody wrote them after the parent. Only what occurred is listed. `cpu_s`: processor seconds of comparing,
    compressing and hashing (writes at the same time share their threads, and so this figure).
    """

    snapshot_id: str
    new_bytes: int
    pages_new: int
    pages_shared: Mapping[str, int]
    timings_s: Mapping[str, float]
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Overlay:
    """Pages of one part that differ from the template's (or from zeros), ready to inject."""

    indices: PageIndices
    data: PageData


@dataclass(frozen=True)
class PartDiff:
    """How a part differs from one snapshot to another, in pages. `listed`: those that either has of its own; `zeroed` and
    `reverted`: of the changed ones those that are, in the second, zeros and the base's."""

    pages_total: int
    listed: int
    changed: int
    zeroed: int
    reverted: int


class SnapshotStore(Protocol):
    """Manifests, page maps and layers over a blob store. Raises Corrupt, NotFound, OutOfSpace, HasDependents."""

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
        """Store one snapshot; durable when it returns (manifest fsynced last). On any error nothing is visible.

        The buffers of `parts` must stay as they are until it returns. The parent only saves bytes: if it cannot be
        read (Corrupt, NotFound), the same call without it stores the same snapshot; not so with a part that
        `inherits`, which needs the parent's pages. Also raises BadInput.
        """
        ...

    def manifest(self, snapshot_id: str) -> Mapping[str, Any]:
        """Return the verified manifest as JSON data."""
        ...

    def overlay(
        self, snapshot_id: str, part: str, *, template: TemplatePages | None, sources: list[PageSource] | None = None,
        sparing: bool = False,
    ) -> Overlay:  # fmt: skip
        """Return the pages to put over the template; every frame's hash is verified on the way. `sparing`: of a remote
        store only the frames that hold them are fetched, together, and no copy of a layer is made.

        Raises Incompatible unless `template` is the one the snapshot was taken over (or both are none).
        """
        ...

    def vmstate(self, snapshot_id: str) -> bytes:
        """Return the verified device state."""
        ...

    def materialise(
        self,
        snapshot_id: str,
        part: str,
        target: Path,
        *,
        template: TemplatePages | None = None,
        sources: list[PageSource] | None = None,
    ) -> None:
        """Write the whole part to a sparse file (temp name and rename), byte for byte what was captured."""
        ...  # fmt: skip

    def difference(
        self,
        left_id: str,
        right_id: str,
        part: str,
        *,
        templates: tuple[TemplatePages | None, TemplatePages | None],
        sources: list[PageSource] | None = None,
    ) -> PartDiff:
        """Compare a part of two snapshots, each over its template, in little memory. Raises BadInput for other sizes."""
        ...

    def verify(self, snapshot_id: str) -> Mapping[str, Any]:
        """Re-hash everything reachable; raises Corrupt naming the blob."""
        ...

    def fetch_bytes(self, snapshot_id: str) -> int:
        """Return how many bytes a restore has to bring from a remote store first; 0 if all of it is on this node.

        Raises NotFound, Corrupt.
        """
        ...

    def shapes(self, ids: Iterable[str]) -> dict[str, Shape]:
        """Return what each of these manifests says about bytes; those that cannot be read are left out."""
        ...

    def dependents(self, snapshot_id: str, all_ids: list[str]) -> list[str]:
        """Return who of `all_ids` depends on it; what that means: `lineage.dependents`. Unreadable ones don't count."""
        ...

    def discard(self, snapshot_id: str) -> Mapping[str, int]:
        """Delete a snapshot that nobody names, and what it alone needs, at once; see `sweep.discard`."""
        ...

    def collect(
        self, live_ids: list[str], *, grace_s: float, now: float, wanted: Iterable[str] = ()
    ) -> Mapping[str, int]:
        """Mark from the live manifests, and from those of `wanted` that are there, and sweep older unreferenced blobs.

        Returns counts and bytes freed. A live manifest that is missing or damaged raises before anything is deleted.
        """
        ...

    def giving_way(self) -> AbstractContextManager[None]:
        """While in it, what the store does behind everybody's back leaves processors and disk alone: a snapshot is being
        taken. (`write` sees to that itself.)"""
        ...

    def recompress(
        self, policy: Recompression, *, now: float, stopped: Callable[[], bool], tell: Callable[[str], None]
    ) -> Mapping[str, int]:
        """Compress layers that sleep long once more (`recompress`), on an idle CPU; one round at a time.

        Returns counts: recompressed, bytes given back. `stopped` is asked often: once true, it ends within a frame's time
        and nothing is lost. Raises OutOfSpace, Unavailable.
        """
        ...

    def used_bytes(self) -> int:
        """Return the bytes of everything stored. Costs a listing."""
        ...
