"""Pages, templates and sources for the tests of this room."""

import functools

import numpy as np
from blake3 import blake3

from recess.blobs import MemoryBlobs
from recess.errors import Corrupt
from recess.snapshots import RawPart

ALIKE = 1 << 20


@functools.cache
def page(number):
    """A page whose content is told by a number; 0 is zeros. Half of it compresses; of those from ALIKE on a quarter is the
    same in all, so that frames of more pages are worth it."""
    out = np.zeros(4096, np.uint8)
    if number:
        out[:2048] = np.frombuffer(blake3(b"page %d" % number).digest(length=2048), np.uint8)
        out[4088:] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
    if number >= ALIKE:
        out[:1024] = np.frombuffer(blake3(b"every page").digest(length=1024), np.uint8)
    out.flags.writeable = False
    return out


def pages(*numbers):
    return np.stack([page(n) for n in numbers]) if numbers else np.empty((0, 4096), np.uint8)


def raw(name, total, content):
    """A raw part from {page number: content number}."""
    rows = sorted(content)
    return RawPart(name, total, np.array(rows, np.uint32), pages(*(content[n] for n in rows)))


class ArrayTemplate:
    def __init__(self, template_id, parts):
        self.template_id = template_id
        self._parts = parts
        for part in parts.values():
            part.flags.writeable = False

    def part(self, name):
        return self._parts[name]

    def held(self, name):
        return np.flatnonzero(self._parts[name].any(axis=1)).astype(np.uint32)


class FileSource:
    def __init__(self, blocks):
        self._blocks = [block.tobytes() for block in blocks]
        self.source_hash = blake3(b"".join(self._blocks)).hexdigest()

    def lookup_many(self, data):
        where = {block: n for n, block in enumerate(self._blocks)}
        return np.array([where.get(row.tobytes(), -1) for row in data], np.int64)

    def read_block(self, block):
        if not 0 <= block < len(self._blocks):
            raise Corrupt(f"no block {block}")
        return memoryview(self._blocks[block])


def damage_each(data, *, every=1):
    """Yield (what, bytes) with one bit flipped, at every `every`-th byte, and cut at as many places."""
    for at in range(0, len(data), every):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        yield f"bit of byte {at}", bytes(flipped)
        yield f"cut at {at}", data[:at]
    yield "one byte more", data + b"\0"


class Blobs(MemoryBlobs):
    """Memory blobs whose content a test may replace."""

    def replace(self, key, data):
        with self._lock:
            self._blobs[key] = (data, self._blobs[key][1])

    def age(self, seconds):
        with self._lock:
            self._blobs = {key: (data, at - seconds) for key, (data, at) in self._blobs.items()}
