"""Room `frames`: files in the Zstandard Seekable Format with verified frames. Knows nothing of what is in them."""

from recess.frames.index_v1 import FRAMES_MAX, FrameTable
from recess.frames.pool import WorkPool
from recess.frames.seekable import SeekableFile, SeekableReader, build_seekable
from recess.frames.zstd import FRAME_RAW_BYTES_MAX, Frame, FrameEncoder, decode_frame

__all__ = [
    "FRAMES_MAX",
    "FRAME_RAW_BYTES_MAX",
    "Frame",
    "FrameEncoder",
    "FrameTable",
    "SeekableFile",
    "SeekableReader",
    "WorkPool",
    "build_seekable",
    "decode_frame",
]
