"""Room `blobs`: bytes by key, written once. The bottom of every stored thing; it knows nothing of their meaning.

`blobs.s3` is not part of this index: only the composition root names a remote store, and importing it costs time.
"""

from recess.blobs.caching import CacheState, CachingBlobs, SparingBlobs
from recess.blobs.contract import BlobInfo, BlobStore, check_key, read_pieces
from recess.blobs.draft import Draft, draft_of
from recess.blobs.local import LocalBlobs
from recess.blobs.memory import MemoryBlobs
from recess.blobs.metering import MeteredBlobs, Traffic
from recess.blobs.nearest import NearestBlobs
from recess.blobs.retry import RetryingBlobs, RetryPolicy
from recess.blobs.wrapped import WrappedBlobs

__all__ = [
    "BlobInfo",
    "BlobStore",
    "CacheState",
    "CachingBlobs",
    "Draft",
    "LocalBlobs",
    "MemoryBlobs",
    "MeteredBlobs",
    "NearestBlobs",
    "RetryPolicy",
    "RetryingBlobs",
    "SparingBlobs",
    "Traffic",
    "WrappedBlobs",
    "check_key",
    "draft_of",
    "read_pieces",
]
