"""Where bodies too large for a row go: bytes by their own hash, durable when `put` returns. It must know no session.

A body is written before the row that names it; a crash in between leaves garbage, never a row without its body. Putting what
is there renews its age, and a sweep removes only what is old: so a body that is about to be named is not swept.
Synchronous: async callers use a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from recess.blobs import BlobStore
from recess.errors import Corrupt, NotFound, OutOfSpace, Unavailable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEVEL = 3
_TEMP = ".new-"
FOLDER = "body"


class BodyStore(Protocol):
    """Bytes by the BLAKE3-256 hex of their content. Putting the same bytes again is cheap and harmless."""

    def put(self, data: bytes) -> str:
        """Store durably and return the hash. Raises OutOfSpace, Unavailable."""
        ...

    def get(self, digest: str, size: int) -> bytes:
        """Return the bytes, `size` of them, verified. Raises Corrupt (also when they are gone), Unavailable."""
        ...

    def older_than(self, before_s: float) -> Iterator[tuple[str, int]]:
        """Yield (hash, bytes stored) of what was put last before this wall time, in any order."""
        ...

    def drop(self, digest: str, before_s: float) -> bool:
        """Remove a body unless it was put again since `before_s`; tell whether it is gone."""
        ...


class MemoryBodies:
    """Bodies in a dict, for tests and for logs without a disk."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}
        self._put_s: dict[str, float] = {}

    def put(self, data: bytes) -> str:
        """Keep a copy."""
        digest = blake3(data).hexdigest()
        self._data[digest] = bytes(data)
        self._put_s[digest] = time.time()
        return digest

    def older_than(self, before_s: float) -> Iterator[tuple[str, int]]:
        """Yield what is old."""
        yield from [(digest, len(self._data[digest])) for digest, at in self._put_s.items() if at < before_s]

    def drop(self, digest: str, before_s: float) -> bool:
        """Forget a body."""
        if self._put_s.get(digest, before_s) >= before_s:
            return False
        del self._put_s[digest]
        return self._data.pop(digest, None) is not None

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
        self._lock = threading.Lock()  # no body goes between being found here and being made young

    def put(self, data: bytes) -> str:
        """Store durably. A file that is there already was complete when it got its name; its age is renewed."""
        digest = blake3(data).hexdigest()
        target = self._path(digest)
        try:
            if self._renew(target):
                _sync_folder(target.parent)
            else:
                _write_durably(target, zstd.compress(data, level=_LEVEL))
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
        return _unpack(packed, digest, size)

    def older_than(self, before_s: float) -> Iterator[tuple[str, int]]:
        """Yield what is old; also what an interrupted `put` left behind, under its temporary name."""
        for path in self._dir.glob("??/*") if self._dir.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                info = path.stat()
                if info.st_mtime < before_s:
                    yield path.name, info.st_size

    def drop(self, digest: str, before_s: float) -> bool:
        """Remove a file that is still old."""
        paths = self._dir.glob(f"??/{digest}") if digest.startswith(_TEMP) else [self._path(digest)]
        try:
            with self._lock:
                for path in paths:
                    if path.stat().st_mtime < before_s:
                        path.unlink()
                        return True
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise Unavailable(f"log body: cannot remove {digest}: {exc}") from exc
        return False

    def _renew(self, target: Path) -> bool:
        """Make a file young; False if there is none."""
        with self._lock:
            try:
                os.utime(target)
            except FileNotFoundError:
                return False
        return True

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not digest.isalnum():
            raise _corrupt(digest[:64], "that is not a hash")
        return self._dir / digest[:2] / digest


class BlobBodies:
    """Bodies in a blob store that several nodes share, as zstd under `FOLDER/IDENTITY/ab/abcdef...`."""

    def __init__(self, blobs: BlobStore, identity: str) -> None:
        self._blobs = blobs
        self._folder = f"{FOLDER}/{identity}"

    def put(self, data: bytes) -> str:
        """Store durably; what is there already becomes young."""
        digest = blake3(data).hexdigest()
        if not self._blobs.touch(self._key(digest)):
            self._blobs.put(self._key(digest), zstd.compress(data, level=_LEVEL))
        return digest

    def get(self, digest: str, size: int) -> bytes:
        """Read, unpack at most `size` bytes, verify."""
        try:
            packed = self._blobs.get(self._key(digest), max_bytes=size + size // 128 + 4096)
        except NotFound as exc:
            raise _corrupt(digest, "it is not there") from exc
        return _unpack(packed, digest, size)

    def older_than(self, before_s: float) -> Iterator[tuple[str, int]]:
        """Yield what is old."""
        for info in self._blobs.list_blobs(f"{self._folder}/"):
            if info.modified_s < before_s:
                yield info.key.rpartition("/")[2], info.size_bytes

    def drop(self, digest: str, before_s: float) -> bool:
        """Remove a blob that is still old. Between the look and the removal another node may make it young: a store knows no
        such act. The grace period makes that a matter of milliseconds after a day."""
        try:
            if self._blobs.stat(self._key(digest)).modified_s >= before_s:
                return False
        except NotFound:
            return False
        return self._blobs.delete(self._key(digest))

    def _key(self, digest: str) -> str:
        if len(digest) != 64 or not digest.isalnum():
            raise _corrupt(digest[:64], "that is not a hash")
        return f"{self._folder}/{digest[:2]}/{digest}"


def _unpack(packed: bytes, digest: str, size: int) -> bytes:
    try:
        data: bytes = zstd.ZstdDecompressor().decompress(packed, max_length=size + 1)
    except (zstd.ZstdError, EOFError) as exc:
        raise _corrupt(digest, str(exc)) from exc
    if len(data) != size or blake3(data).hexdigest() != digest:
        raise _corrupt(digest, "its bytes are not what was written")
    return data


def _write_durably(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=_TEMP)
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
