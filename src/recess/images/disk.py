"""Blank writable disks: a sparse ext4 file of any size whose few data blocks are the same on every node.

Made once per size by mkfs.ext4 (no root needed) and then copied extent by extent: small journal, all tables
initialised (so no guest kernel thread fills them in later, page by page, into every snapshot), fixed ids and times.
This module must know nothing of machines or of what is put on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recess.errors import BadInput
from recess.images.files import build_dir, publish_file, space_errors
from recess.images.tools import run_tool
from recess.units import GIB, MIB

_UUID = "5ec0e550-a9c8-4b7f-8f0e-726563657373"
_MIN_BYTES, _MAX_BYTES = 16 * MIB, 4096 * GIB
_JOURNAL_MB = 4
_BLOCK = 4096
_FICLONE = 0x40049409  # linux/fs.h: share the extents where the filesystem can
_RECIPE = 1  # part of the cached file's name; raise it when the options change
_FEATURES = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,uninit_bg,dir_nlink,extra_isize"


@dataclass(frozen=True)
class BlankDisk:
    """A blank ext4 file, never to be written: `clone_sparse` it. Sizes in bytes."""

    path: Path
    size_bytes: int
    allocated_bytes: int


def ensure_blank_disk(images_dir: Path, size_bytes: int) -> BlankDisk:
    """Return the blank disk of this size, made on first use (some 20 ms) and kept below `disks/`.

    Raises BadInput for a size that is no multiple of 4096 or out of 16 MiB..4 TiB, MissingTool, OutOfSpace.
    """
    if size_bytes % _BLOCK or not _MIN_BYTES <= size_bytes <= _MAX_BYTES:
        raise BadInput(f"a disk cannot have {size_bytes} bytes", hint="16 MiB to 4 TiB, in steps of 4 KiB")
    path = images_dir / "disks" / f"blank-{_RECIPE}-{size_bytes}.ext4"
    if not path.is_file():
        with build_dir(images_dir) as work:
            full = work / "full.ext4"
            _make(full, size_bytes)
            sparse = work / "sparse.ext4"
            _dig(full, sparse)
            sparse.chmod(0o444)
            publish_file(sparse, path)
    return BlankDisk(path, size_bytes, path.stat().st_blocks * 512)


def _make(path: Path, size_bytes: int) -> None:
    with path.open("wb") as handle:
        handle.truncate(size_bytes)
    # Fixed time and hash seed: the same size gives the same bytes on every node.
    fixed = f"lazy_itable_init=0,lazy_journal_init=0,nodiscard,packed_meta_blocks=1,hash_seed={_UUID},root_owner=0:0"
    command = ["env", "E2FSPROGS_FAKE_TIME=1000000000", "mkfs.ext4", "-q", "-F", "-b", str(_BLOCK), "-m", "0"]
    run_tool(
        [
            *command,
            "-I",
            "256",
            "-i",
            "16384",
            "-J",
            f"size={_JOURNAL_MB}",
            "-O",
            _FEATURES,
            "-U",
            _UUID,
            "-E",
            fixed,
            path,
        ]
    )


def _dig(source: Path, target: Path) -> None:
    """Copy a file leaving out its blocks of zeros."""
    zeros = bytes(_BLOCK)
    with source.open("rb") as src, target.open("wb") as dst:
        for start, end in data_extents(src.fileno()):
            for offset in range(start, end, _BLOCK):
                block = os.pread(src.fileno(), min(_BLOCK, end - offset), offset)
                if block != zeros[: len(block)]:
                    os.pwrite(dst.fileno(), block, offset)
        dst.truncate(source.stat().st_size)


def data_extents(fd: int) -> list[tuple[int, int]]:
    """Return the (start, end) byte ranges of a file that hold data, ascending."""
    size = os.fstat(fd).st_size
    found: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, position))
    return found


def blocks_with_data(*files: int) -> NDArray[np.uint32]:
    """Return the numbers of all 4 KiB blocks where any of the files holds data, ascending."""
    parts = [
        np.arange(start // _BLOCK, -(-end // _BLOCK), dtype=np.uint32)
        for fd in files
        for start, end in data_extents(fd)
    ]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint32)


def clone_sparse(source: Path, target: Path) -> None:
    """Copy a sparse file: shared extents where the filesystem can, else only its data. `target` must not exist.

    Not atomic and not durable: a half-written target is the caller's to remove. Raises OutOfSpace, FileExistsError.
    """
    with space_errors(str(target)), source.open("rb") as src, target.open("xb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
            return
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        dst.truncate(os.fstat(src.fileno()).st_size)
        for start, end in data_extents(src.fileno()):
            _copy_range(src.fileno(), dst.fileno(), start, end)


def _copy_range(src: int, dst: int, start: int, end: int) -> None:
    """Copy bytes inside the kernel where it can (not across all filesystems), else through a buffer."""
    with contextlib.suppress(OSError):
        while start < end:
            count = os.copy_file_range(src, dst, end - start, start, start)
            if count == 0:
                break
            start += count
    while start < end:
        piece = os.pread(src, min(end - start, MIB), start)
        if not piece:
            return
        start += os.pwrite(dst, piece, start)
