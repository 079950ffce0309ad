"""Boot files for the fake driver: any image name is one, nothing is on disk, hashes follow from the name.

Fulfils `recess.machines.parts.ImageFiles`, so that a node with the fake driver needs no kernel, no root and no set-up.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from recess.errors import NotFound
from recess.machines.contract import BootFiles
from recess.snapshots.contract import PageSource

_NAME = re.compile(r"[a-z0-9][a-z0-9._/:-]{0,127}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


class FakeImages:
    """Images made of nothing. `missing` names images that do not exist, for tests of that error."""

    def __init__(self, missing: frozenset[str] = frozenset({"missing"})) -> None:
        self._missing = missing

    async def boot_files(self, image: str) -> BootFiles:
        """Return made-up files; raises NotFound for a name in `missing` or one no image could have."""
        if image in self._missing or not _NAME.fullmatch(image):
            raise NotFound(f"no image named {image!r}", hint="recess images ls", kind="image", ref=image)
        return self._files(_digest(f"root {image}"), _digest("kernel"), _digest("initrd"))

    async def boot_files_by_hash(self, root_hash: str, kernel_hash: str, initrd_hash: str) -> BootFiles:
        """Return the files of these hashes."""
        return self._files(root_hash, kernel_hash, initrd_hash)

    @staticmethod
    def _files(root: str, kernel: str, initrd: str) -> BootFiles:
        nowhere = Path("/nonexistent")
        return BootFiles(nowhere / "kernel", kernel, nowhere / "initrd", initrd, nowhere / "root", root)

    async def sources(self, boot: BootFiles) -> list[PageSource]:
        """Return none."""
        return []

    async def blank_disk(self, size_bytes: int, target: Path) -> None:
        """Make a sparse file of zeros."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.truncate(size_bytes)
