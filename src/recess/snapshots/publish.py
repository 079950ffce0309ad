"""The order in which a snapshot becomes durable, and what keeps the garbage collector away from one in the making.

    files (vmstate, layer, page maps: in parallel, each fsynced with its name)  ->  manifest

Until the manifest has its name, nothing names the files: a crash at any point before leaves garbage for the sweep and
the older snapshots as they were; after it, everything the manifest names is durable, because each `put` returned
before the manifest's began. An error (not a crash) takes back what was added, so that a full disk gets its space again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType

from recess.blobs import BlobStore, Draft, draft_of
from recess.crashpoints import Crashed, crash_point
from recess.errors import Corrupt
from recess.frames import SeekableFile
from recess.snapshots.keys import key_of, keys_of, make_id


class Pins:
    """Blob keys in use by writes that have not committed. A sweep deletes under the same lock that pins are taken
    under, so it either deletes before the writer looks (who then writes the blob again) or sees the pin and leaves it.

    A pin released while a sweep runs lasts until that sweep ends: its marks are older than the new manifest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._sweeps = 0
        self._lingering: set[str] = set()

    def hold(self, keys: Iterable[str]) -> None:
        """Pin these keys; may be called for one key many times, each to be released."""
        with self._lock:
            self._held.update(keys)

    def release(self, keys: Iterable[str]) -> None:
        """Give back pins taken with `hold`."""
        with self._lock:
            for key in keys:
                self._held[key] -= 1
                if not self._held[key]:
                    del self._held[key]
                if self._sweeps:
                    self._lingering.add(key)

    @contextmanager
    def sweep(self) -> Iterator[None]:
        """Run a sweep: call before it looks at anything."""
        with self._lock:
            self._sweeps += 1
        try:
            yield
        finally:
            with self._lock:
                self._sweeps -= 1
                if not self._sweeps:
                    self._lingering.clear()

    def delete(self, blobs: BlobStore, key: str, *, own: int = 0) -> bool:
        """Delete a blob unless somebody holds it (`own` of the pins being the caller's); tell whether it went."""
        with self._lock:
            if self._held[key] > own or (not own and key in self._lingering):
                return False
            return blobs.delete(key)


class Publication:
    """The files of one snapshot on their way to the store. Use as a context manager: an error inside takes all back."""

    def __init__(self, blobs: BlobStore, pins: Pins, io: ThreadPoolExecutor) -> None:
        self._blobs = blobs
        self._pins = pins
        self._io = io
        self._keys: list[str] = []
        self._puts: list[tuple[str, int, Future[bool]]] = []
        self._drafts: list[Draft] = []
        self.made: list[str] = []
        self.new_bytes = 0

    def hold(self, keys: Iterable[str]) -> None:
        """Keep older blobs from being swept until this publication ends."""
        for key in keys:
            self._keys.append(key)
            self._pins.hold([key])

    def begin(self) -> Draft:
        """Begin a file whose bytes are written while they are made; it becomes one of the files by `add`."""
        self._drafts.append(draft_of(self._blobs))
        return self._drafts[-1]

    def add(self, prefix: str, file: SeekableFile, draft: Draft | None = None) -> str:
        """Start storing a file, or finish the draft that has its bytes; return its id. Its pieces must stay unchanged
        until `commit`."""
        file_id = make_id(prefix, file.index_hash)
        self.hold(keys_of(file_id))
        self.made.append(file_id)
        self._puts.append((file_id, file.size_bytes, self._io.submit(self._put, file_id, file, draft)))
        return file_id

    def _put(self, file_id: str, file: SeekableFile, draft: Draft | None) -> bool:
        crash_point("snapshot.before_file")
        key = key_of(file_id)
        added = self._blobs.put(key, list(file.pieces)) if draft is None else draft.put(key)
        if not added and self._blobs.stat(key).size_bytes != file.size_bytes:
            raise Corrupt(f"{file_id} was stored before with another size", blob=file_id)
        return added

    def commit(self, snapshot_id: str, manifest: bytes) -> None:
        """Store the manifest, after everything it names is durable. The snapshot exists when this returns."""
        self.new_bytes += sum(size for _, size, future in self._puts if future.result())
        key = key_of(snapshot_id)
        self.hold([key])
        crash_point("snapshot.before_manifest")
        if self._blobs.put(key, manifest):
            self.new_bytes += len(manifest)
        crash_point("snapshot.after_manifest")

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and not isinstance(error, Crashed):
                self._take_back()
        finally:
            self._pins.release(self._keys)
            self._keys.clear()

    def _take_back(self) -> None:
        """Remove the files that this publication added and nobody else uses. The manifest never came to be."""
        wait([future for _, _, future in self._puts])
        for draft in self._drafts:
            draft.drop()
        for file_id, _, future in self._puts:
            if future.exception() is None and future.result():
                key = key_of(file_id)
                self._pins.delete(self._blobs, key, own=self._keys.count(key))
