"""Every reader of bytes that a stranger may have made, as a function of bytes: for fuzzers, and to replay what they found.

A target may return or raise a `RecessError`; anything else that it raises is a fault of ours, and so are endless loops and
memory out of proportion. Hashes would stop a fuzzer at the door, though a stranger computes them as well as we do: so each
target is given the bytes behind the hash. The driver is `tools/fuzz.py`, the corpus `tests/property/corpus`.
"""

from __future__ import annotations

import asyncio
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
from recess.guestlink import wire
from recess.guestlink.channel import Channel
from recess.guestlink.frames import Decoder
from recess.guestlink.hello import greet
from recess.guestlink.link import ByteStream
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
from recess.units import MIB

Target = Callable[[bytes], None]
_KINDS = (LAYER_KIND, PACK_KIND, VMSTATE_KIND)
_POOL = WorkPool(1)
_FRAMES = 64  # of one file that are read
_PATIENCE_S = 20.0  # for a wait that an end of input must end


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


def guest(data: bytes) -> None:
    """What a guest says: its hello, then frames to a host that has asked, pinged, and has streams and a job open."""
    asyncio.run(_hear(data))


class _Sink(asyncio.Transport):
    """A transport whose other end takes everything."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol: asyncio.Protocol | None = protocol
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take it."""

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self._protocol is None

    def close(self) -> None:
        """Tell the protocol."""
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(None)

    def abort(self) -> None:
        """The same."""
        self.close()

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0


def _connected(reader: asyncio.StreamReader) -> asyncio.StreamWriter:
    protocol = asyncio.StreamReaderProtocol(reader)
    return asyncio.StreamWriter(_Sink(protocol), protocol, reader, asyncio.get_running_loop())


async def _hear(data: bytes) -> None:
    early = asyncio.StreamReader()
    early.feed_data(data)
    early.feed_eof()
    writer = _connected(early)
    with suppress(RecessError):
        await greet(early, writer, Decoder(), _PATIENCE_S)
    writer.close()
    reader = asyncio.StreamReader()
    channel = Channel(reader, _connected(reader), Decoder(), wire.Hello(wire.PROTO, "nonce"), [])

    async def serve(_service: str, _meta: object, stream: ByteStream) -> None:
        while await stream.read():
            pass

    channel.serve_incoming(serve)
    working = asyncio.all_tasks() - {asyncio.current_task()}  # one that ends with an error would be forgotten
    asked = [channel.ask({"op": "stats"})[1] for _ in range(3)]
    stream, job = channel.new_stream(), channel.new_job()
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        if channel.failure is None:  # else it is closed
            reader.feed_data(piece)
        for _ in range(3):  # its turn to read, and that of those who wait for what it read
            await asyncio.sleep(0)
            working |= asyncio.all_tasks() - {asyncio.current_task()}
    if channel.failure is None:
        reader.feed_eof()
    for waiting in (stream.read_all(MIB, _PATIENCE_S), job.wait(), *asked):
        with suppress(RecessError):
            async with asyncio.timeout(_PATIENCE_S):
                await waiting
    await channel.close()
    for outcome in await asyncio.gather(*working, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(
            outcome, RecessError | OSError | asyncio.CancelledError
        ):
            raise outcome


TARGETS: dict[str, Target] = {
    "archive": archive,
    "frame": frame,
    "frames_file": frames_file,
    "frames_index": frames_index,
    "guest": guest,
    "manifest": manifest,
    "page_map": page_map,
}
