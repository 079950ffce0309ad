"""Where bodies too large for a row go: bytes by their own hash, durable when `put` returns. It must know no session.

A body is written before the row that names it; a crash in between leaves garbage, never a row without its body.
Synchronous: async callers use a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from recess.errors import Corrupt, OutOfSpace, Unavailable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEVEL = 3


class BodyStore(Protocol):
    """Bytes by the BLAKE3-256 hex of their content. Putting the same bytes again is cheap and harmless."""

    def put(self, data: bytes) -> str:
        """Store durably and return the hash. Raises OutOfSpace, Unavailable."""
        ...

    def get(self, digest: str, size: int) -> bytes:
        """Return the bytes, `size` of them, verified. Raises Corrupt (also when they are gone), Unavailable."""
        ...


class MemoryBodies:
    """Bodies in a dict, for tests and for logs without a disk."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        """Keep a copy."""
        digest = blake3(data).hexdigest()
        self._data[digest] = bytes(data)
        return digest

    def get(self, digest: str, size: int) -> bytes:
        """Return what was put."""
        data = self._data.get(digest)
        if data is None or len(data) != size:
            raise _corrupt(digest, "it is not there")
        return data


class DirectoryBodies:
    """Bodies as zstd files `ab/abcdef...` in a folder: temporary name, fsync, rename, fsync of the folder."""

    def __init__(self, directory: Path) -> None:
        self._dir = directory

    def put(self, data: bytes) -> str:
        """Store durably. A file that is there already was complete when it got its name; its age is renewed."""
        digest = blake3(data).hexdigest()
        target = self._path(digest)
        try:
            if not target.exists():
                _write_durably(target, zstd.compress(data, level=_LEVEL))
            else:
                os.utime(target)
                _sync_folder(target.parent)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(
                    f"log body: the disk of {self._dir} is full", hint="free some space and retry"
                ) from exc
            raise Unavailable(f"log body: cannot write {target}: {exc}") from exc
        return digest

    def get(self, digest: str, size: int) -> bytes:
        """Read, unpack at most `size` bytes, verify."""
        try:
            packed = self._path(digest).read_bytes()
        except FileNotFoundError as exc:
            raise _corrupt(digest, "it is not there") from exc
        except OSError as exc:
            raise Unavailable(f"log body: cannot read {self._path(digest)}: {exc}") from exc
        try:
            data: bytes = zstd.ZstdDecompressor().decompress(packed, max_length=size + 1)
        except (zstd.ZstdError, EOFError) as exc:
            raise _corrupt(digest, str(exc)) from exc
        if len(data) != size or blake3(data).hexdigest() != digest:
            raise _corrupt(digest, "its bytes are not what was written")
        return data

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not digest.isalnum():
            raise _corrupt(digest[:64], "that is not a hash")
        return self._dir / digest[:2] / digest


def _write_durably(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=".new-")
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        Path(name).rename(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    _sync_folder(target.parent)
    _sync_folder(target.parent.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _corrupt(digest: str, why: str) -> Corrupt:
    return Corrupt(
        f"log body {digest[:16]} is damaged: {why}", hint="restore it from a backup of the home", blob=digest
    )
