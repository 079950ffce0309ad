"""The pages that a pager brings, written down as they come, so that next time they need not come at all.

The file has no name: if anything goes wrong, or the pager dies, nothing is left of it. It holds the pages of a book back to
back, and is whole when the pager is done; whoever takes it then gives it a name (`pagefiles.PageFiles.adopt`).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from recess.paging.book import Numbers, Piece
from recess.units import PAGE_BYTES


class KeptFile:
    """Safe to use from several threads. `fd` is -1 where it cannot be had: no room for it (`max_bytes`, and at least
    `reserve_bytes` stay free on the disk), or a file system without nameless files."""

    def __init__(self, folder: Path, pages: Numbers, *, max_bytes: int, reserve_bytes: int) -> None:
        self._pages = pages
        self.fd = -1
        wanted = len(pages) * PAGE_BYTES
        try:
            disk = os.statvfs(folder)
            if wanted <= min(max_bytes, disk.f_bavail * disk.f_frsize - reserve_bytes):
                self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o400)
        except OSError:
            return

    def keep(self, piece: Piece) -> None:
        """Write pages of the book that are neighbours. A disk that cannot ends the keeping, and nothing else."""
        fd, data = self.fd, piece.data.reshape(-1).data
        offset = int(np.searchsorted(self._pages, piece.first)) * PAGE_BYTES
        try:
            while fd >= 0 and data:
                done = os.pwrite(fd, data, offset)
                data, offset = data[done:], offset + done
        except OSError:
            self.fd = -1  # not closed: another thread may be writing
