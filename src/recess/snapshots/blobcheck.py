"""Is this blob what its key says? Checked while it streams past, in the memory of one piece.

The key of everything in the store is a hash: of the bytes (manifests), or of an index that holds the hash of every frame
(layers, page maps, device states). So a blob from a stranger, a cut transfer or a bad disk is found out here, before
anybody relies on it. What the pages inside mean is not looked at: `Store.verify` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blake3 import blake3

from recess.errors import BadInput, Corrupt
from recess.frames import RecodedReader, SeekableReader
from recess.snapshots.keys import LAYER, PAGEMAP, RECODED_FOLDER, SNAPSHOT, VMSTATE, digest_of, id_of
from recess.snapshots.layer_v1 import KIND as LAYER_KIND
from recess.snapshots.manifest_v1 import MANIFEST_BYTES_MAX
from recess.snapshots.pack_v1 import KIND as PACK_KIND
from recess.snapshots.reader import VMSTATE_KIND

_KINDS = {LAYER: LAYER_KIND, PAGEMAP: PACK_KIND, VMSTATE: VMSTATE_KIND}
ReadRange = Callable[[int, int], bytes]


def checked_pieces(key: str, size_bytes: int, read: ReadRange, source: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces of `source` unchanged, having hashed them; raises Corrupt at the latest after the last one.

    `read` gives ranges of the same blob (its index is at its end). Raises BadInput for a key that is no hash of ours.
    """
    ref = id_of(key)
    if ref is None:
        raise BadInput(f"not a blob of a snapshot: {key[:80]!r}")
    if ref.startswith(f"{SNAPSHOT}_"):
        yield from _checked_whole(ref, size_bytes, source)
    else:
        yield from _checked_frames(key, ref, size_bytes, read, source)


def _checked_whole(ref: str, size_bytes: int, source: Iterator[bytes]) -> Iterator[bytes]:
    if size_bytes > MANIFEST_BYTES_MAX:
        raise Corrupt(f"{ref}: a manifest of {size_bytes} bytes is over the cap", blob=ref)
    data = bytearray()
    for piece in source:
        data += piece
        if len(data) > size_bytes:
            break
    if len(data) != size_bytes or blake3(data).hexdigest() != digest_of(ref):
        raise _mismatch(ref)
    yield bytes(data)


def _checked_frames(key: str, ref: str, size_bytes: int, read: ReadRange, source: Iterator[bytes]) -> Iterator[bytes]:
    tail = _Tail(read)
    if key.startswith(f"{RECODED_FOLDER}/"):  # consistent, and of the right index; that its content is right is shown
        recoded = RecodedReader(tail.read, size_bytes, digest_of(ref), _KINDS[ref[:3]], ref)  # by unpacking it
        table = recoded.own_table
    else:
        table = SeekableReader(tail.read, size_bytes, digest_of(ref), _KINDS[ref[:3]], ref).table
    frames_end = int(table.offsets[-1])
    ends = [*table.offsets[1:].tolist(), size_bytes]
    wanted = [*(row.tobytes() for row in table.hashes), blake3(tail.since(frames_end, size_bytes)).digest()]
    at, number, hasher = 0, 0, blake3()
    for piece in source:
        view = memoryview(piece)
        while view:
            if number == len(ends):
                raise _mismatch(ref)  # longer than it should be
            part = view[: ends[number] - at]
            hasher.update(part)
            at += len(part)
            view = view[len(part) :]
            if at == ends[number]:
                if hasher.digest() != wanted[number]:
                    raise _mismatch(ref)
                number, hasher = number + 1, blake3()
        yield piece
    if number != len(ends):
        raise _mismatch(ref)


def _mismatch(ref: str) -> Corrupt:
    return Corrupt(f"{ref} is not what its name says", blob=ref)


class _Tail:
    """Remembers the bytes that the reader of the index has verified, so that the streamed ones can be held against them."""

    def __init__(self, read: ReadRange) -> None:
        self._read = read
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        data = self._read(offset, length)
        if not self._data or offset < self._start:
            self._start, self._data = offset, data
        return data

    def since(self, offset: int, end: int) -> bytes:
        """Return the verified bytes from `offset` to the end of the file."""
        if offset < self._start or self._start + len(self._data) != end:
            raise ValueError("the index was not read as expected")
        return self._data[offset - self._start :]
