"""What machines start from: root images by name, kernel and initial root, blank writable disks, pages by content.

`images` must know nothing of machines, snapshots, drivers or sessions; they are handed paths, hashes and page sources.
"""

from recess.images.boot import BootFiles, ensure_boot_files
from recess.images.disk import BlankDisk, clone_sparse, ensure_blank_disk
from recess.images.pages import FilePages
from recess.images.store import BASE_IMAGE, ImageInfo, ImageStore

__all__ = [
    "BASE_IMAGE",
    "BlankDisk",
    "BootFiles",
    "FilePages",
    "ImageInfo",
    "ImageStore",
    "clone_sparse",
    "ensure_blank_disk",
    "ensure_boot_files",
]
