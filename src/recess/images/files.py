"""Files that appear whole or not at all, and the folder that builds happen in. Knows nothing of images or kernels.

Crash safety: everything is first written below `tmp/`, fsynced, and then renamed into place, and the folder is
fsynced; a reader therefore sees the old state or the new one. A build folder carries an flock for as long as its
process lives, so that the next build can tell a crashed one's leftovers (lock free) from a neighbour at work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from recess.errors import Corrupt, OutOfSpace


def hash_file(path: Path) -> str:
    """Return the BLAKE3-256 of a file in hex, read through a mapping on all cores."""
    hasher = blake3(max_threads=blake3.AUTO)
    if path.stat().st_size:
        hasher.update_mmap(path)
    return hasher.hexdigest()


def hash_bytes(data: bytes) -> str:
    """Return the BLAKE3-256 of bytes in hex."""
    return blake3(data).hexdigest()


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def space_errors(what: str) -> Iterator[None]:
    """Turn a full disk or an exceeded quota into OutOfSpace that says what was being written."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(
                f"no space left while writing {what}", hint="free some space, or set RECESS_HOME to a larger disk"
            ) from exc
        raise


def publish_file(source: Path, target: Path) -> None:
    """Move a finished file into place, durably; both on one filesystem. Replaces what was there in one step."""
    fsync_path(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    fsync_path(target.parent)


def publish_dir(source: Path, target: Path) -> None:
    """Move a finished folder to its content address, durably. If the address is taken, what is there stays."""
    for path in sorted(source.rglob("*")):
        fsync_path(path)
    fsync_path(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(source)
    fsync_path(target.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with space_errors(str(path)):
            temp.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
            publish_file(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def read_json(path: Path, version: int) -> dict[str, Any]:
    """Return a JSON object of this format version. Raises Corrupt; FileNotFoundError when it is absent."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as exc:
        raise Corrupt(f"{path} is not valid JSON", hint="remove it and create the image again") from exc
    if not isinstance(value, dict) or value.get("version") != version:
        raise Corrupt(f"{path} is not a version {version} metadata file", hint="remove it and create it again")
    return value


def _sweep(parent: Path) -> None:
    for leftover in parent.iterdir():
        with contextlib.suppress(OSError):
            fd = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(fd)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one holder at a time, among threads and processes; it ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def build_dir(images_dir: Path) -> Iterator[Path]:
    """Yield an empty folder on the images' filesystem; it is gone afterwards, however the block ends.

    Folders of builds whose process died are removed first.
    """
    parent = images_dir / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / secrets.token_hex(8)
    # Under the parent's lock, since a folder that is made but not yet locked looks like a crashed build's to a neighbour.
    with locked(parent):
        _sweep(parent)
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with space_errors(str(path)):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)
