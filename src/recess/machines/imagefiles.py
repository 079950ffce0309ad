"""The images room as the machines room uses it: boot files of an image, page sources, blank disks. Off the event loop.

Fulfils `recess.machines.parts.ImageFiles` over `recess.images`. It must know nothing of drivers or snapshots.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from recess.errors import NotFound
from recess.images import BootFiles as KernelFiles
from recess.images import FilePages, ImageStore, clone_sparse, ensure_blank_disk, ensure_boot_files, kernels
from recess.images.portable import KERNEL, find_file, is_hash
from recess.machines.contract import BootFiles
from recess.machines.parts import Progress
from recess.snapshots.contract import PageSource


class StoredImages:
    """Images, kernel and initial root below one folder. Page sources are mapped once and kept."""

    def __init__(self, images_dir: Path, guestd: Path, progress: Progress, *, kernel: str = kernels.AUTO) -> None:
        self._dir = images_dir
        self._guestd = guestd
        self._wanted = kernel
        self._progress = progress
        self._store = ImageStore(images_dir)
        self._kernel: tuple[tuple[tuple[int, int], ...], KernelFiles] | None = None
        self._sources: dict[str, FilePages] = {}
        self._lock = asyncio.Lock()

    async def boot_files(self, image: str) -> BootFiles:
        """Return the files for a new machine of this image."""
        async with self._lock:
            return await asyncio.to_thread(self._boot_files, image)

    def _boot_files(self, image: str) -> BootFiles:
        info = self._store.get(image)
        stamp = self._stamp()
        if self._kernel is None or self._kernel[0] != stamp:
            self._kernel = (stamp, ensure_boot_files(self._dir, self._guestd, self._progress, kernel=self._wanted))
        files = self._kernel[1]
        return BootFiles(
            files.kernel, files.kernel_hash, files.initrd, files.initrd_hash, info.root_path, info.root_hash
        )

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """What the files go by: a new guestd or kernel is taken by the next machine, without a restart."""
        return kernels.stamp([self._guestd, *kernels.chosen_by(self._dir, self._wanted)])

    async def boot_files_by_hash(self, root_hash: str, kernel_hash: str, initrd_hash: str) -> BootFiles:
        """Return exactly these files; the initial root is only needed to boot, so it may be gone."""
        kernel = find_file(self._dir, KERNEL, kernel_hash)
        if not is_hash(initrd_hash):
            raise NotFound(
                f"not the hash of an initial root: {initrd_hash[:80]!r}", kind="initrd", ref=initrd_hash[:80]
            )
        initrd = self._dir / "initrd" / initrd_hash / "initrd.cpio"
        root = await asyncio.to_thread(self._store.root, root_hash)
        if kernel is None:
            raise NotFound(f"no kernel {kernel_hash[:12]} on this node", kind="kernel", ref=kernel_hash)
        return BootFiles(kernel, kernel_hash, initrd, initrd_hash, root, root_hash)

    async def sources(self, boot: BootFiles) -> list[PageSource]:
        """Return the root's and the kernel's blocks."""
        async with self._lock:
            return [
                await asyncio.to_thread(self._open, boot.root, boot.root_hash),
                await asyncio.to_thread(self._open, boot.kernel, boot.kernel_hash),
            ]

    def _open(self, path: Path, digest: str) -> FilePages:
        if digest not in self._sources:
            self._sources[digest] = FilePages.open(path, digest)
        return self._sources[digest]

    async def blank_disk(self, size_bytes: int, target: Path) -> None:
        """Put a formatted, empty writable disk at `target`."""

        def work() -> None:
            blank = ensure_blank_disk(self._dir, size_bytes)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            clone_sparse(blank.path, target)

        await asyncio.to_thread(work)

    def close(self) -> None:
        """Unmap the page sources."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()
