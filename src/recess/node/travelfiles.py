"""The root image and the kernel that a snapshot needs: packed for a journey, unpacked after one, or said to be missing.

A snapshot refers to them by hash and does not hold them (most nodes have them, and they are large). A node without them
cannot restore it: so they may go along (`--with-image`), and whoever takes a snapshot in is told what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from recess.blobs import BlobStore, read_pieces
from recess.errors import NotFound
from recess.images.portable import KERNEL, ROOT, find_file, install, packed, unpacked
from recess.machines.parts import ImageFiles, Progress
from recess.machines.templates import manifest_vm
from recess.snapshots.keys import FILE_KEY, file_key


class TravelFiles:
    """The image files of this node, as travellers."""

    def __init__(self, images_dir: Path, images: ImageFiles, progress: Progress) -> None:
        self._dir = images_dir
        self._images = images
        self._progress = progress

    def needed(self, manifest: Mapping[str, Any]) -> dict[str, str]:
        """Return hash -> kind of the files that a machine of this snapshot runs on. Raises Corrupt."""
        vm = manifest_vm(manifest)
        return {str(vm.get("root", "")): ROOT, str(vm.get("kernel", "")): KERNEL}

    async def missing(self, manifest: Mapping[str, Any]) -> str:
        """Return in words what this node lacks, "" if nothing."""
        vm = manifest_vm(manifest)
        try:
            await self._images.boot_files_by_hash(*(str(vm.get(name, "")) for name in ("root", "kernel", "initrd")))
        except NotFound as exc:
            return exc.message
        return ""

    def pack(self, manifest: Mapping[str, Any], target: BlobStore) -> list[str]:
        """See that a store holds the packed files; return their hashes. Raises NotFound if this node lacks one."""
        for digest, kind in self.needed(manifest).items():
            path = find_file(self._dir, kind, digest)
            if path is None:
                raise NotFound(f"no {kind} {digest[:12]} on this node", kind=kind, ref=digest)
            if not target.touch(file_key(digest)):
                self._progress(f"packing the {kind}, {path.stat().st_size} bytes")
                target.put_stream(file_key(digest), partial(packed, path))
        return sorted(self.needed(manifest))

    def unpack(self, manifest: Mapping[str, Any], source: BlobStore) -> None:
        """Put in place what this node lacks and a store holds. Raises Corrupt, OutOfSpace, Unavailable."""
        for digest, kind in self.needed(manifest).items():
            key = file_key(digest)
            if FILE_KEY.fullmatch(key) is None or find_file(self._dir, kind, digest) is not None:
                continue  # a manifest from elsewhere may name anything
            if source.exists(key):
                self._progress(f"unpacking the {kind}")
                size = source.stat(key).size_bytes
                install(self._dir, kind, digest, partial(read_pieces, source, key, size))


def check_file(pieces: Iterator[bytes], digest: str) -> None:
    """Raise Corrupt unless these are a packed file of this content."""
    for _ in unpacked(pieces, digest):
        pass
