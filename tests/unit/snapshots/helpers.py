"""Pages, templates and sources for the tests of this room."""

import functools

import numpy as np
from blake3 import blake3

from recess.errors import Corrupt
from recess.snapshots import RawPart


@functools.cache
def page(number):
    """A page whose content is told by a number; 0 is zeros. Half of it compresses."""
    out = np.zeros(4096, np.uint8)
    if number:
        out[:2048] = np.random.Generator(np.random.PCG64(number)).integers(0, 256, 2048, np.uint8)
        out[4088:] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
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
