"""Snapshots out of a store into an archive, and back. The format is `archive_v1`'s; here are the reads, puts and checks.

Import: what the head announces is judged first (space, names), then each blob is taken in if it is missing, spooled to a
temporary file and checked against its name before it becomes visible; the manifest comes last; then everything is read
once more as a restore would (`Store.verify`). An import that breaks off leaves blobs that nothing names: begun again
it skips them, else the collector removes them. This module must know nothing of names, catalogs or HTTP.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recess.blobs import BlobStore
from recess.crashpoints import crash_point
from recess.errors import Corrupt, NotFound, OutOfSpace
from recess.snapshots.archive_v1 import Announcement, ArchiveReader, layout
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.keys import FILE_KEY, file_key, id_of
from recess.snapshots.transfer import Item, Tell, TransferReport, checked_blob, closure, present

PIECE_BYTES = 1 << 20
CheckFile = Callable[[Iterator[bytes], str], None]
_INCOMPLETE = "this archive cannot be imported: it does not hold what its manifest names"


def announce(blobs: BlobStore, snapshot_id: str, name: str, files: Sequence[str] = ()) -> Announcement:
    """Return the head of a snapshot's archive; `files`: hashes of packed image files in the store, to go with it.

    Raises NotFound, Corrupt.
    """
    first = [Item(file_key(digest), blobs.stat(file_key(digest)).size_bytes) for digest in files]
    return Announcement(snapshot_id, name, (*first, *closure(blobs, snapshot_id)))


def archive_bytes(announcement: Announcement) -> int:
    """Return the size of the archive."""
    return sum(segment.size_bytes for segment in layout(announcement))


def archive_pieces(blobs: BlobStore, announcement: Announcement, *, start: int = 0) -> Iterator[bytes]:
    """Yield the archive from byte `start` on.

    A blob that is given whole is checked on the way out (Corrupt breaks the archive off before its end); the rest of a
    blob at whose middle `start` lies is not, nor is an image file: their hashes are of all of it, or of what it unpacks
    to. The importer checks them.
    """
    at = 0
    for segment in layout(announcement):
        skip = min(max(start - at, 0), segment.size_bytes)
        at += segment.size_bytes
        if skip == segment.size_bytes:
            continue
        if segment.item is None:
            yield segment.data[skip:]
        elif not skip and FILE_KEY.fullmatch(segment.item.key) is None:
            yield from checked_blob(blobs, segment.item)
        else:
            for offset in range(skip, segment.size_bytes, PIECE_BYTES):
                yield blobs.get_range(segment.item.key, offset, min(PIECE_BYTES, segment.size_bytes - offset))


class Import:
    """One archive on its way into a store. `spool`: a folder for one blob at a time; `free_bytes`: of the store's disk.

    `check_file`: reads a packed image file and raises Corrupt unless its content has this hash.
    """

    def __init__(
        self,
        blobs: BlobStore,
        reader: ArchiveReader,
        spool: Path,
        free_bytes: Callable[[], int],
        check_file: CheckFile,
    ) -> None:
        self._blobs = blobs
        self._reader = reader
        self._spool = spool
        self._free_bytes = free_bytes
        self._check_file = check_file
        self.announcement = reader.announcement

    def run(self, *, tell: Tell) -> TransferReport:
        """Take in what is missing, the manifest last. The caller then verifies, and drops the manifest if that fails.

        The caller keeps the collector away from the announced keys meanwhile. Raises Corrupt, OutOfSpace.
        """
        items = self.announcement.items
        missing = {item for item in items if not present(self._blobs, item)}
        wanted = sum(i.size_bytes for i in missing) + max((i.size_bytes for i in missing), default=0)
        if wanted > self._free_bytes():
            raise OutOfSpace(f"the archive needs {wanted} bytes of room", hint="recess snapshots prune, then try again")
        commit = items[-1]
        for item, content in self._reader.members():
            if item == commit:
                self._check_complete(commit, content, missing)
            elif item in missing:
                tell(f"taking in {item.key.rpartition('/')[2][:16]}, {item.size_bytes} bytes")
                self._take(item, content)
        sent = sum(item.size_bytes for item in missing)
        return TransferReport(len(missing), sent, len(items) - len(missing), self.announcement.total_bytes - sent)

    def _check_complete(self, commit: Item, content: Iterator[bytes], missing: set[Item]) -> None:
        """Take the manifest in, but only if what it needs is what came: nothing less, nothing else."""
        if commit in missing:
            crash_point("import.before_manifest")
            self._take(commit, content)
            crash_point("import.after_manifest")
        try:
            needed = {id_of(item.key) for item in closure(self._blobs, self.announcement.snapshot_id)}
            came = set(self.announcement.items) - set(self.announcement.files.values())
            if needed != {id_of(item.key) for item in came} or len(came) != len(needed):
                raise Corrupt(_INCOMPLETE)
        except Exception as exc:
            if commit in missing:
                self._blobs.delete(commit.key)
            if isinstance(exc, NotFound):
                raise Corrupt(_INCOMPLETE) from exc
            raise

    def _take(self, item: Item, content: Iterator[bytes]) -> None:
        with tempfile.TemporaryFile(dir=self._spool) as file:
            try:
                for piece in content:
                    file.write(piece)
                file.flush()
            except OSError as exc:
                raise OutOfSpace(f"no space to take in {item.key}: {exc.strerror}") from exc
            fd = file.fileno()

            def read(offset: int, length: int) -> bytes:
                data = os.pread(fd, length, offset)
                if len(data) != length:
                    raise Corrupt(f"{item.key} ends before byte {offset + length}", blob=item.key)
                return data

            def spooled() -> Iterator[bytes]:
                for offset in range(0, item.size_bytes, PIECE_BYTES):
                    yield read(offset, min(PIECE_BYTES, item.size_bytes - offset))

            match = FILE_KEY.fullmatch(item.key)
            if match is not None:
                self._check_file(spooled(), match[1])
                self._blobs.put_stream(item.key, spooled)
                return
            self._blobs.put_stream(item.key, lambda: checked_pieces(item.key, item.size_bytes, read, spooled()))
