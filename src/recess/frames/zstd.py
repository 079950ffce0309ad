"""The one import of Zstandard (standard library from Python 3.14, its backport before) and one frame, both ways.

A frame is an independent zstd frame with its content size in the header and no checksum: integrity is a BLAKE3-256 of
the compressed bytes, checked before the decoder sees them. Both directions release the GIL. Knows nothing of files.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from blake3 import blake3

from recess.errors import Corrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LEVEL_MIN, LEVEL_MAX = -50, 22
FRAME_RAW_BYTES_MAX = 4 << 20  # a decoder never allocates more than this for one frame
HASH_BYTES = 32
_WINDOW_LOG_MAX = 22  # of FRAME_RAW_BYTES_MAX: a header that asks for more memory is refused

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Frame:
    """One compressed frame: its bytes, the size of its content, and the BLAKE3-256 of both.

    `stored_bytes` is the size of `data`, which may be dropped (`without_data`) once it was written.
    """

    data: bytes
    raw_bytes: int
    hash: bytes
    content: bytes
    stored_bytes: int

    def without_data(self) -> Frame:
        """Return what the table needs to know of this frame."""
        return replace(self, data=b"")


class FrameEncoder:
    """Compresses frames at one level. Not thread-safe: one per task (it reuses its working memory)."""

    def __init__(self, level: int) -> None:
        self._compressor = zstd.ZstdCompressor(level=level)

    def encode(self, raw: Bytes) -> Frame:
        """Return `raw` (at most FRAME_RAW_BYTES_MAX bytes) as one frame."""
        size = memoryview(raw).nbytes
        if size > FRAME_RAW_BYTES_MAX:
            raise ValueError(f"a frame holds at most {FRAME_RAW_BYTES_MAX} bytes, not {size}")
        data = self._compressor.compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)
        return Frame(data, size, blake3(data).digest(), blake3(raw).digest(), len(data))


def decode_frame(data: Bytes, raw_bytes: int, expected: bytes, name: str) -> bytes:
    """Return the content of one frame after checking its hash. Raises Corrupt, naming `name`.

    Memory is bounded by `raw_bytes`, whatever the frame claims: it may have been made by somebody who lies.
    """
    if blake3(data).digest() != expected:
        raise Corrupt(f"{name}: bytes do not match their hash", blob=name)
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
    try:
        raw = decoder.decompress(data, raw_bytes)
        if not decoder.eof and len(raw) == raw_bytes:
            raw += decoder.decompress(b"", 1)  # the end mark may still be unread; one byte more is a lie
    except (zstd.ZstdError, EOFError) as exc:
        raise Corrupt(f"{name}: not a zstd frame: {exc}", blob=name) from exc
    if len(raw) != raw_bytes or not decoder.eof or decoder.unused_data:
        raise Corrupt(f"{name}: content is not the {raw_bytes} bytes it should be", blob=name)
    return raw
