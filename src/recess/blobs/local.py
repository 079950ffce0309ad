"""A blob store in a folder of the local disk: one file a blob, its key as the relative path.

How a put survives a crash: the bytes go to a file in `.tmp/`, which is fsynced; `link` gives it its final name (it
fails if the name exists: put-if-absent is the file system's own atomic act); the folder is fsynced; the temporary
name goes. A crash before the link leaves only a file in `.tmp/`, which `clean` removes; after it, a whole blob. The
name can become durable only after the content, since the content was fsynced first: no key ever shows part of a blob.
A draft goes the same way, only that its bytes are on their way to the disk before its key is known.

Files are made read-only: nothing of ours ever writes to a blob again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from recess.blobs.contract import BlobInfo, Bytes, PieceSource, Ranges, check_key, pieces
from recess.crashpoints import Crashed, crash_point
from recess.errors import BadInput, Corrupt, NotFound, OutOfSpace, Unavailable

_TMP = ".tmp"  # cannot be a key: parts never start with a dot
_IOV_MAX = 512  # buffers in one writev; the kernel takes 1024
_DRAFT_STEP = 1 << 20  # bytes of a draft after which the kernel is told to begin writing them
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE: begin, and don't wait
_WRITE_AND_WAIT = 1 | 2 | 4  # WAIT_BEFORE, WRITE, WAIT_AFTER: the data only; the file system's journal is left alone


class LocalBlobs:
    """Blobs below `root`, which is created (mode 0700) if missing. Raises Unavailable if the folder cannot be used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            (root / _TMP).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _translate(exc, str(root)) from exc
            raise Unavailable(f"blob store: cannot use {root}: {exc.strerror}", errno=exc.errno) from exc

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        return self._publish(key, lambda temp: _write_synced(temp, pieces(data), _IOV_MAX))

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`. An OSError of the source is taken for one of this store."""
        return self._publish(key, lambda temp: _write_synced(temp, (v for p in source() for v in pieces(p)), 1))

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        return _touch(self.root / check_key(key))

    def draft(self) -> LocalDraft:
        """See `Drafting.draft`."""
        return LocalDraft(self)

    def temporary(self) -> Path:
        """Return a new name for a file that is not a blob yet; `clean` removes what a crash leaves of it."""
        return self.root / _TMP / secrets.token_hex(12)

    def _publish(self, key: str, write: Callable[[Path], None]) -> bool:
        """Make a file of what `write` writes; see the head of this module for the order."""
        target = self.root / check_key(key)
        if _touch(target):
            return False
        temp = self.temporary()
        try:
            write(temp)
            return self.link(temp, key)
        except OSError as exc:
            raise _translate(exc, key) from exc
        except Crashed:
            temp = self.root  # a real crash removes nothing
            raise
        finally:
            if temp is not self.root:
                temp.unlink(missing_ok=True)

    def link(self, temp: Path, key: str) -> bool:
        """Give a file whose bytes are durable its name for good; False if there is one of that name. Raises OSError."""
        target = self.root / check_key(key)
        _make_folders(self.root, target.parent)
        crash_point("blobs.before_link")
        try:
            os.link(temp, target)
        except FileExistsError:
            if not _touch(target):
                raise BadInput(f"blob key {key} is a folder of other keys") from None
            return False
        crash_point("blobs.before_folder_sync")
        try:
            _sync_folder(target.parent)
        except OSError:
            target.unlink(missing_ok=True)  # an error means: nothing was added
            raise
        return True

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        try:
            with (self.root / check_key(key)).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise Corrupt(f"blob {key} holds {size} bytes, at most {max_bytes} were expected", blob=key)
                return _read_exactly(file.fileno(), 0, size, key)
        except OSError as exc:
            raise _translate(exc, key) from exc

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self.get_ranges(key, [(offset, length)])[0]

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`."""
        try:
            with (self.root / check_key(key)).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for offset, length in ranges:
                    if offset < 0 or length < 0 or offset + length > size:
                        raise Corrupt(f"blob {key} ends before byte {offset + length}", blob=key)
                return [_read_exactly(file.fileno(), offset, length, key) for offset, length in ranges]
        except OSError as exc:
            raise _translate(exc, key) from exc

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        try:
            found = (self.root / check_key(key)).stat()
        except OSError as exc:
            raise _translate(exc, key) from exc
        if not stat.S_ISREG(found.st_mode):
            raise NotFound(f"no such blob: {key}", kind="blob", ref=key)
        return BlobInfo(key, found.st_size, found.st_mtime)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        return (self.root / check_key(key)).is_file()

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`."""
        target = self.root / check_key(key)
        try:
            target.unlink()
            _sync_folder(target.parent)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as exc:
            raise _translate(exc, key) from exc
        return True

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        yield from self._walk(self.root / folder, f"{folder}/" if folder else "", prefix)

    def _walk(self, folder: Path, base: str, prefix: str) -> Iterator[BlobInfo]:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in entries:
            key = base + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(folder / entry.name, f"{key}/", prefix)
            elif key.startswith(prefix):
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield BlobInfo(key, found.st_size, found.st_mtime)

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`."""
        removed = 0
        for entry in list(os.scandir(self.root / _TMP)):
            try:
                if entry.stat(follow_symlinks=False).st_mtime < before_s:
                    Path(entry.path).unlink()
                    removed += 1
            except FileNotFoundError:
                continue  # its put has just ended
        return removed


class LocalDraft:
    """A blob of `LocalBlobs` on its way; see `recess.blobs.draft.Draft`."""

    def __init__(self, blobs: LocalBlobs) -> None:
        self._blobs = blobs
        self._temp = blobs.temporary()
        self._pending = 0
        try:
            self._fd = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        except OSError as exc:
            raise _translate(exc, "a new blob") from exc

    def write(self, data: Bytes) -> None:
        """See `Draft.write`."""
        try:
            _write_all(self._fd, pieces(data))
        except OSError as exc:
            raise _translate(exc, "a new blob") from exc
        self._pending += memoryview(data).nbytes
        if self._pending >= _DRAFT_STEP:
            _write_back(self._fd, _BEGIN_WRITING)
            self._pending = 0

    def flush(self) -> None:
        """See `Draft.flush`."""
        _write_back(self._fd, _WRITE_AND_WAIT)

    def put(self, key: str) -> bool:
        """See `Draft.put`."""
        try:
            if _touch(self._blobs.root / check_key(key)):
                return False
            crash_point("blobs.before_sync")
            os.fsync(self._fd)
            return self._blobs.link(self._temp, key)
        except OSError as exc:
            raise _translate(exc, key) from exc
        except Crashed:
            self._close()  # a real crash removes nothing
            raise
        finally:
            self.drop()

    def drop(self) -> None:
        """See `Draft.drop`."""
        if self._close():
            self._temp.unlink(missing_ok=True)

    def _close(self) -> bool:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return fd >= 0


_LIBC = ctypes.CDLL(None, use_errno=True)


def _write_back(fd: int, how: int) -> None:
    """Have the kernel write what a file has in memory. Promises nothing: the fsync does, and tells of errors."""
    call = getattr(_LIBC, "sync_file_range", None)  # Linux has it; without it the fsync takes longer
    if call is not None:
        call(fd, ctypes.c_int64(0), ctypes.c_int64(0), how)


def _write_synced(path: Path, source: Iterable[memoryview], at_once: int) -> None:
    """Create `path` with these bytes and fsync it; `at_once`: how many views are held and written together."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        iterator = iter(source)
        while views := list(islice(iterator, at_once)):
            _write_all(fd, views)
        crash_point("blobs.before_sync")
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, views: list[memoryview]) -> None:
    while views:
        written = os.writev(fd, views)
        while written:  # drop what went out; a write may be short
            if written >= views[0].nbytes:
                written -= views.pop(0).nbytes
            else:
                views[0] = views[0][written:]
                written = 0


def _read_exactly(fd: int, offset: int, length: int, key: str) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts, got = [data], len(data)  # a signal or a limit of 2 GiB cut the read short
    while got < length:
        data = os.pread(fd, length - got, offset + got)
        if not data:
            raise Corrupt(f"blob {key} ends before byte {offset + length}", blob=key)
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def _touch(path: Path) -> bool:
    """Renew the time of an existing file; False if there is none."""
    if not path.is_file():
        return False
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _make_folders(root: Path, folder: Path) -> None:
    """Create `folder` below `root`, each new name fsynced in its parent, so that a durable blob has a durable path."""
    missing: list[Path] = []
    while folder != root and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _translate(exc: OSError, key: str) -> NotFound | OutOfSpace | Unavailable:
    if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return NotFound(f"no such blob: {key}", kind="blob", ref=key)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"no space for blob {key}", hint="free disk space: recess snapshots prune, recess images rm")
    return Unavailable(f"blob store: {key}: {exc.strerror}", errno=exc.errno)
