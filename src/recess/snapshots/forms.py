"""The two forms a layer may be stored in, under one id: as it was written, and recompressed (`frames.recoded_v1`).

    layers/lyr_..      as written
    recoded/lyr_..     recompressed; put, durable and read back before the first form goes

Both may be there (a crash, or a snapshot that wrote the same layer again): then the first is read. It may go while
somebody reads it, in this process or in another one: the reader finds the second form and goes on with it. Snapshots
name ids only, so nothing that refers to a layer changes, and no policy is known here (`recompress`).
"""

from __future__ import annotations

import threading
from functools import partial

from recess.blobs import BlobInfo, BlobStore
from recess.errors import NotFound
from recess.frames import RecodedReader, SeekableReader
from recess.frames.seekable import Runs, Sink
from recess.snapshots.keys import RECODED_FOLDER, digest_of, id_of, key_of, keys_of, recoded_key_of
from recess.snapshots.layer_v1 import KIND

NEAR, FAR = 8, 64
"""Frames asked for together: of a file on this disk so few that threads share the work; of one afar so many that what lies
together, or nearly so, comes by one request, and what does not by requests side by side."""


class LayerFile(SeekableReader):
    """A layer's file as it was written, that turns to the recompressed form when the first one goes."""

    def __init__(self, blobs: BlobStore, layer_id: str, size_bytes: int, at_once: int) -> None:
        key = key_of(layer_id)
        super().__init__(
            partial(blobs.get_range, key), size_bytes, digest_of(layer_id), KIND, layer_id,
            read_many=partial(blobs.get_ranges, key), at_once=at_once,
        )  # fmt: skip
        self._blobs = blobs
        self._other: RecodedReader | None = None
        self._turning = threading.Lock()

    def _read_runs(self, runs: Runs, sink: Sink) -> None:
        try:
            if self._other is None:
                super()._read_runs(runs, sink)
                return
        except NotFound:  # raised by the read, before anything was handed to the sink
            with self._turning:
                if self._other is None:
                    self._other = _open_recoded(self._blobs, self.name, self._at_once)
        self._other._read_runs(runs, sink)


def open_layer(blobs: BlobStore, layer_id: str, size_bytes: int, *, at_once: int = NEAR) -> SeekableReader:
    """Return the file of a layer in the form that is there. `size_bytes`: of the form as written; `at_once`: how many frames
    are asked for together.

    Raises NotFound (naming the usual key), Corrupt, Incompatible.
    """
    try:
        return LayerFile(blobs, layer_id, size_bytes, at_once)
    except NotFound as missing:
        try:
            return _open_recoded(blobs, layer_id, at_once)
        except NotFound:
            raise missing from None


def _open_recoded(blobs: BlobStore, layer_id: str, at_once: int) -> RecodedReader:
    key = recoded_key_of(layer_id)
    return RecodedReader(
        partial(blobs.get_range, key), blobs.stat(key).size_bytes, digest_of(layer_id), KIND, layer_id,
        read_many=partial(blobs.get_ranges, key), at_once=at_once,
    )  # fmt: skip


def stored_form(blobs: BlobStore, ref: str) -> BlobInfo:
    """Return key and size of a file in the form that is read. Raises NotFound (naming the usual key)."""
    try:
        return blobs.stat(key_of(ref))
    except NotFound:
        for key in keys_of(ref)[1:]:
            if blobs.exists(key):
                return blobs.stat(key)
        raise


def recoded_sizes(blobs: BlobStore) -> dict[str, int]:
    """Return the stored size of every recompressed layer, by id. Costs a listing."""
    infos = blobs.list_blobs(f"{RECODED_FOLDER}/")
    return {ref: info.size_bytes for info in infos if (ref := id_of(info.key)) is not None}
