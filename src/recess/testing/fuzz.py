"""Every reader of bytes that a stranger may have made, as a function of bytes: for fuzzers, and to replay what they found.

A target may return or raise a `RecessError`; anything else that it raises is a fault of ours, and so are endless loops and
memory out of proportion. Hashes would stop a fuzzer at the door, though a stranger computes them as well as we do: so each
target is given the bytes behind the hash. The driver is `tools/fuzz.py`, the corpus `tests/property/corpus`.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from recess.blobs import MemoryBlobs
from recess.errors import Corrupt, RecessError
from recess.frames import RecodedReader, SeekableReader, WorkPool
from recess.frames.index import decode_index
from recess.frames.seekable import encode_tail
from recess.frames.zstd import FRAME_RAW_BYTES_MAX, decode_frame
from recess.snapshots.archive import Import
from recess.snapshots.archive_v1 import ArchiveReader
from recess.snapshots.keys import SNAPSHOT, key_of, make_id
from recess.snapshots.layer_v1 import KIND as LAYER_KIND
from recess.snapshots.layer_v1 import LayerReader
from recess.snapshots.manifest_v1 import decode_manifest
from recess.snapshots.pack_v1 import KIND as PACK_KIND
from recess.snapshots.pack_v1 import read_pack
from recess.snapshots.pagemap_v1 import LEAF_PAGES, decode_tree
from recess.snapshots.reader import VMSTATE_KIND, OpenSnapshot
from recess.testing.fuzz_machines import guest, gvisor_state, page_faults, proxy
from recess.units import MIB

Target = Callable[[bytes], None]
_KINDS = (LAYER_KIND, PACK_KIND, VMSTATE_KIND)
_POOL = WorkPool(1)
_FRAMES = 64  # of one file that are read


def _ranges(data: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        if not 0 <= offset <= offset + length <= len(data):
            raise Corrupt("ends before that")
        return data[offset : offset + length]

    return read


def _use(reader: SeekableReader, kind: bytes) -> None:
    """Read a file as its users do."""
    if kind == LAYER_KIND:
        layer = LayerReader(reader)
        layer.owners()
        for number in range(min(reader.table.count, _FRAMES)):
            layer.frame(number)
    elif kind == PACK_KIND:
        read_pack(reader, _POOL)
    else:
        reader.raw(_POOL, max_bytes=MIB)


def frames_file(data: bytes) -> None:
    """A whole file of frames, of any kind: layer, pack, device state, recoded layer."""
    for kind in _KINDS:
        with suppress(RecessError):
            _use(SeekableReader(_ranges(data), len(data), None, kind, "fuzz"), kind)
    with suppress(RecessError):
        carried = SeekableReader(_ranges(data), len(data), None, b"RCOD", "fuzz").extra[40:]
        name = blake3(carried).hexdigest()
        _use(RecodedReader(_ranges(data), len(data), name, LAYER_KIND, "fuzz"), LAYER_KIND)


def frames_index(data: bytes) -> None:
    """The index of a file, with the seek table that belongs to it and frames of nothing."""
    for kind in (*_KINDS, b"RCOD"):
        with suppress(RecessError):
            table, _ = decode_index(data, kind, "fuzz")
            tail, start = encode_tail(table, data), int(table.offsets[-1])

            def read(offset: int, length: int, tail: bytes = tail, start: int = start) -> bytes:
                if offset < start:  # the first read may begin before the index
                    return bytes(min(start - offset, length)) + tail[: max(0, offset + length - start)]
                return tail[offset - start : offset - start + length]

            reader = SeekableReader(read, start + len(tail), blake3(data).hexdigest(), kind, "fuzz")
            if kind == b"RCOD":
                RecodedReader(read, reader.size_bytes, blake3(reader.extra[40:]).hexdigest(), LAYER_KIND, "fuzz")
            else:
                _use(reader, kind)


def frame(data: bytes) -> None:
    """One compressed frame whose hash is right: two bytes of size, in 64 bytes, and the frame."""
    raw_bytes = min(int.from_bytes(data[:2], "little") * 64, FRAME_RAW_BYTES_MAX)
    with suppress(RecessError):
        decode_frame(data[2:], raw_bytes, blake3(data[2:]).digest(), "fuzz")


def page_map(data: bytes) -> None:
    """One node of a page map, with right nodes above it; below it, the same node again."""

    def inner(digest: bytes) -> bytes:
        return b"\2\1\1\0\0\0\0\0" + b"\0\0" + digest

    def root(digest: bytes) -> bytes:
        return b"\3\1\0\0\1\0\0\0" + (LEAF_PAGES * 256).to_bytes(8, "little") + bytes(4) + digest

    def name(node: bytes) -> bytes:
        return blake3(node).digest()

    between = inner(name(data))
    over_inner, over_leaf = root(name(data)), root(name(between))
    nodes = {name(node): node for node in (data, between, over_inner, over_leaf)}
    pages = LEAF_PAGES * 256
    for top in (data, over_inner, over_leaf):
        for count in (0, 1, LEAF_PAGES, pages):
            with suppress(RecessError):
                decode_tree(name(top), lambda wanted: nodes.get(wanted, b""), pages_total=pages, count=count)


def manifest(data: bytes) -> None:
    """A manifest's bytes, and, should it be one, all that a restore does with it and with files that it may name."""
    with suppress(RecessError):
        decode_manifest(make_id(SNAPSHOT, blake3(data).hexdigest()), data)
    try:
        text = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        canonical = text.encode()
    except (ValueError, RecursionError):
        return
    snapshot_id = make_id(SNAPSHOT, blake3(canonical).hexdigest())
    blobs = MemoryBlobs()
    for key, content in _stored().items():
        blobs.put(key, content)
    blobs.put(key_of(snapshot_id), canonical)
    with suppress(RecessError):
        snapshot = OpenSnapshot(blobs, snapshot_id, _POOL)
        for name in snapshot.manifest.parts:
            with suppress(RecessError):
                snapshot.read_pages(snapshot.page_map(name), {})
        with suppress(RecessError):
            snapshot.vmstate()
        snapshot.verify()


_FILES: dict[str, bytes] = {}


def give_files(files: dict[str, bytes]) -> None:
    """Say which blobs, by key, are there for manifests to name."""
    _FILES.clear()
    _FILES.update(files)


def _stored() -> dict[str, bytes]:
    return _FILES


def archive(data: bytes) -> None:
    """An archive, imported into an empty store."""

    def check(content: Iterator[bytes], _digest: str) -> None:
        if sum(map(len, content)) % 2:
            raise Corrupt("not that file")

    with suppress(RecessError), tempfile.TemporaryDirectory() as spool:
        reader = ArchiveReader(io.BytesIO(data).read)
        Import(MemoryBlobs(), reader, Path(spool), lambda: 1 << 40, check).run(tell=lambda _: None)


TARGETS: dict[str, Target] = {
    "archive": archive,
    "frame": frame,
    "frames_file": frames_file,
    "frames_index": frames_index,
    "guest": guest,
    "gvisor_state": gvisor_state,
    "manifest": manifest,
    "page_faults": page_faults,
    "page_map": page_map,
    "proxy": proxy,
}
