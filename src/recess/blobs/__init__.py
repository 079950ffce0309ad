"""Room `blobs`: bytes by key, written once. The bottom of every stored thing; it knows nothing of their meaning."""

from recess.blobs.contract import BlobInfo, BlobStore, check_key
from recess.blobs.local import LocalBlobs
from recess.blobs.memory import MemoryBlobs

__all__ = ["BlobInfo", "BlobStore", "LocalBlobs", "MemoryBlobs", "check_key"]
