"""Room `frames`: files in the Zstandard Seekable Format with verified frames. Knows nothing of what is in them."""

from recess.frames.pool import WorkPool
from recess.frames.recoded_v1 import RecodedReader, recode
from recess.frames.seekable import SeekableFile, SeekableReader, build_seekable
from recess.frames.table import FRAMES_MAX, FrameTable
from recess.frames.zstd import FRAME_RAW_BYTES_MAX, LEVEL_MAX, LEVEL_MIN, Frame, FrameEncoder, decode_frame

__all__ = [
    "FRAMES_MAX",
    "FRAME_RAW_BYTES_MAX",
    "LEVEL_MAX",
    "LEVEL_MIN",
    "Frame",
    "FrameEncoder",
    "FrameTable",
    "RecodedReader",
    "SeekableFile",
    "SeekableReader",
    "WorkPool",
    "build_seekable",
    "decode_frame",
    "recode",
]
