"""Layers that sleep long are compressed once more, harder: bytes for time that nobody waits for.

A layer is changed as a whole and for all snapshots that use it: its id stays (`frames.recoded_v1` says why it may), so no
manifest, name, log entry or fork is touched, and a layer that many share is worth it once. Its age is that of the youngest
snapshot that names it: a session that runs names its layers anew with every snapshot, and so keeps them as they are.

    1. compress into recoded/lyr_..     temporary name, fsync, link, fsync of the folder: a crash leaves the layer as it was
    2. read it back, every frame proven
    3. delete layers/lyr_..             a crash before leaves both forms: the old one is read, the next round goes on at 2

What a round finds damaged it leaves as it is: `verify` and restores say so, and take the ladder. A layer that would not
become smaller (noise, or so few pages that the second index outweighs what is saved) stays as it was written: the new
file goes instead, which may be at any time, since the old form is there and is what is read. The caller remembers such
layers, so the cost is paid once in its life. Readers are not disturbed (`forms`); a write that
runs meanwhile and found the old form holds it by a pin, and it stays until the next round.

Which layers: `recompression`. This module must know no clock, no catalog and no configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from recess.blobs import BlobStore
from recess.crashpoints import crash_point
from recess.errors import Corrupt, Incompatible, NotFound, Unsupported
from recess.frames import RecodedReader, SeekableReader, recode
from recess.snapshots.keys import FOLDERS, LAYER_FOLDER, digest_of, id_of, key_of, recoded_key_of
from recess.snapshots.layer_v1 import KIND
from recess.snapshots.publish import Pins
from recess.snapshots.reader import read_manifest
from recess.snapshots.recompression import Recompression, StoredLayer, due

_VAIN_MAX = 100_000  # ids that are remembered: 15 MB


class Stopped(Exception):
    """The round was told to end: what it was at is left as it was."""


class NotSmaller(Exception):
    """The layer stays as it was written: recompressed it would take as much, or more."""


def survey(blobs: BlobStore) -> list[StoredLayer]:
    """Return every layer that a readable manifest names. Costs a listing and a read of each manifest."""
    written = {id_of(info.key): info.size_bytes for info in blobs.list_blobs(f"{LAYER_FOLDER}/")}
    used: dict[str, float] = {}
    for info in blobs.list_blobs(FOLDERS[0]):
        snapshot_id = id_of(info.key)
        if snapshot_id is None:
            continue
        try:
            manifest = read_manifest(blobs, snapshot_id)
        except (NotFound, Corrupt, Incompatible):
            continue  # it went meanwhile, or is for `verify` to tell: its layers are judged by the others
        at = max(info.modified_s, manifest.created_ms / 1000)
        for file in manifest.layers:
            used[file.id] = max(used.get(file.id, 0.0), at)
    return [StoredLayer(ref, at, written.get(ref, 0)) for ref, at in used.items()]


def recompress_layer(
    blobs: BlobStore, pins: Pins, layer: StoredLayer, policy: Recompression, go_on: Callable[[], None]
) -> int:
    """Bring one layer into its recompressed form; return the bytes given back: 0 if somebody still holds the old form.

    `go_on` is called before each frame and raises `Stopped` to end it. May be called again after anything. Raises
    NotSmaller, Corrupt (the layer, or what was made of it; nothing is deleted), Unsupported (an old version), OutOfSpace, NotFound.
    """
    key, other = key_of(layer.id), recoded_key_of(layer.id)
    pins.hold([other])  # no manifest names it by this key; and a sweep that began before may know no such file
    try:
        if not blobs.exists(other):
            read = partial(blobs.get_range, key)
            original = SeekableReader(read, layer.written_bytes, digest_of(layer.id), KIND, layer.id)
            crash_point("recompress.before_file")
            blobs.put_stream(
                other, lambda: recode(original, level=policy.level, frame_bytes=policy.frame_bytes, go_on=go_on)
            )
        crash_point("recompress.before_check")
        if blobs.stat(other).size_bytes >= layer.written_bytes:
            pins.delete(blobs, other, own=1)
            raise NotSmaller
        size = _check(blobs, layer.id, go_on)
        crash_point("recompress.before_swap")
        gone = pins.delete(blobs, key)
        crash_point("recompress.after_swap")
    finally:
        pins.release([other])
    return layer.written_bytes - size if gone else 0


def _check(blobs: BlobStore, layer_id: str, go_on: Callable[[], None]) -> int:
    """Read a recompressed layer whole, as a restore would; return its size. One that is damaged is removed if the form as
    written is still there. Raises Corrupt, Incompatible."""
    try:
        return read_back(blobs, layer_id, go_on)
    except Corrupt:
        if blobs.exists(key_of(layer_id)):
            blobs.delete(recoded_key_of(layer_id))
        raise


def read_back(blobs: BlobStore, layer_id: str, go_on: Callable[[], None] = lambda: None) -> int:
    """Read the recoded form of a layer whole, every frame proven; return its size. Raises Corrupt, Incompatible."""
    key = recoded_key_of(layer_id)
    size = blobs.stat(key).size_bytes
    reader = RecodedReader(partial(blobs.get_range, key), size, digest_of(layer_id), KIND, layer_id)
    for task in reader.tasks(np.arange(reader.table.count), lambda *_: go_on()):
        task()
    return size


def recompress(
    blobs: BlobStore,
    pins: Pins,
    policy: Recompression,
    *,
    now: float,
    more: Callable[[], bool],
    go_on: Callable[[], None],
    tell: Callable[[str], None],
    vain: set[str],
) -> dict[str, int]:
    """Run one round; return how many layers were recompressed and how many bytes that gave back.

    `vain`: layers that would not become smaller, which are passed over; this round adds to it.

    `more` is asked before each layer: a round that is over its budget ends there, and not in the middle of a large layer,
    which would then never be done. `go_on`: see `recompress_layer`. `tell` gets a line for each layer that could not be. Raises OutOfSpace, Unavailable: then no other layer could be.
    """
    counts = {"recompressed": 0, "bytes": 0}
    for layer in due((one for one in survey(blobs) if one.id not in vain), policy, now=now):
        if not more():
            break
        try:
            counts["bytes"] += recompress_layer(blobs, pins, layer, policy, go_on)
            counts["recompressed"] += 1
        except Stopped:
            break
        except NotSmaller:
            if len(vain) < _VAIN_MAX:
                vain.add(layer.id)
        except (NotFound, Unsupported):
            continue  # it went with its last snapshot; or it was written by a version that cannot prove another coding
        except (Corrupt, Incompatible) as exc:
            tell(f"layer {layer.id[:16]} was not recompressed: {exc.message}")
    return counts
