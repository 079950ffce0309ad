"""Looking for bytes where they must not be: in a process's memory, in files, in stored blobs unpacked.

For tests that a secret leaves no trace. Layers are unpacked by plain zstd, never by Recess's own readers: what an attacker
with the files would do. This module must know nothing of machines or formats.
"""

from __future__ import annotations

import subprocess
from io import FileIO
from pathlib import Path

PIECE_BYTES = 8 << 20
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def process_holds(pid: int, needle: bytes) -> bool:
    """Tell whether the bytes are anywhere in a process's memory (what it could read itself)."""
    with FileIO(f"/proc/{pid}/mem") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, rights = line.split()[:2]
            start, end = (int(part, 16) for part in area.split("-"))
            if rights.startswith("r") and _area_holds(memory, start, end, needle):
                return True
    return False


def _area_holds(memory: FileIO, start: int, end: int, needle: bytes) -> bool:
    tail = b""
    for at in range(start, end, PIECE_BYTES):
        try:
            memory.seek(at)
            piece = memory.read(min(PIECE_BYTES, end - at))
        except (OSError, ValueError, OverflowError):
            return False  # vvar, device memory
        if needle in tail + piece:
            return True
        tail = piece[-len(needle) :]
    return False


def files_that_hold(folder: Path, needle: bytes) -> set[Path]:
    """Return the plain files below a folder (links not followed) that hold the bytes as they are."""
    return {
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and _file_holds(path, needle)
    }


def _file_holds(path: Path, needle: bytes) -> bool:
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            if needle in tail + piece:
                return True
            tail = piece[-len(needle) :]
    return False


def blobs_that_hold(folder: Path, needle: bytes) -> set[Path]:
    """Return the files below a folder that hold the bytes once `zstd -dc` has unpacked them."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file() and _begins_with(path, ZSTD_MAGIC):
            unpacked = subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=False)
            if needle in unpacked.stdout:
                found.add(path)
    return found


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
