"""An index frame of any version that this code knows. Who writes one uses the newest (`index_v2`)."""

from __future__ import annotations

import struct

from recess.errors import Corrupt, Incompatible
from recess.frames import index_v1, index_v2
from recess.frames.table import FrameTable

_HEAD = struct.Struct("<8sH14x")  # what every version begins with; as long as the whole head of one
_READERS = {index_v1.VERSION: index_v1.decode_index, index_v2.VERSION: index_v2.decode_index}


def decode_index(data: bytes, kind: bytes, name: str) -> tuple[FrameTable, bytes]:
    """Return table and extra. Raises Corrupt (every count is checked against the size), Incompatible (version)."""
    if len(data) < _HEAD.size:
        raise Corrupt(f"{name}: index too short", blob=name)
    magic, version = _HEAD.unpack_from(data)
    if magic != index_v2.MAGIC:
        raise Corrupt(f"{name}: index has a wrong magic", blob=name)
    if version not in _READERS:
        raise Incompatible(f"{name}: index version {version} is unknown here", reasons=[f"index version {version}"])
    return _READERS[version](data, kind, name)
