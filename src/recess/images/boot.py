"""What a machine boots from: a kernel, and an initial root made for it of guestd and the modules it needs.

    kernel/…                         see `kernels.py`
    initrd/HASH/initrd.cpio          guestd as /init, the modules, /modules/order

A new guestd gives a new initrd in milliseconds, without a network. This module must know nothing of VMMs: which
devices a machine has shows only in the list of modules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from recess.errors import MissingTool
from recess.images import cpio, kernels
from recess.images.files import build_dir, hash_bytes, publish_dir
from recess.images.kernel_debian import fetch_kernel
from recess.images.tools import Progress


@dataclass(frozen=True)
class BootFiles:
    """A kernel and an initial root on this node. Hashes are BLAKE3-256 hex of the files."""

    kernel: Path
    kernel_hash: str
    initrd: Path
    initrd_hash: str
    kernel_package: str  # "linux-image-6.1.0-56-cloud-amd64 6.1.192-2"
    kernel_kind: str = kernels.DEBIAN  # debian | trimmed | own


def ensure_boot_files(
    images_dir: Path, guestd: Path, progress: Progress = lambda _line: None, *, kernel: str = kernels.AUTO
) -> BootFiles:
    """Return the boot files for this guestd and kernel (see `kernels.choose`); fetches Debian's if there is none yet.

    May be called at any time, also by two processes at once. Raises MissingTool (no guestd, no apt), NotFound (no such
    kernel), Unavailable (no mirror), OutOfSpace, Corrupt, BadInput.
    """
    if not guestd.is_file():
        raise MissingTool(f"guestd is not built: {guestd}", hint="run tools/setup.sh")
    found = kernels.choose(images_dir, kernel, functools.partial(fetch_kernel, images_dir, progress))
    archive = build_initrd(guestd.read_bytes(), [(p.name, p.read_bytes()) for p in found.modules])
    digest = hash_bytes(archive)
    target = images_dir / "initrd" / digest
    if not (target / "initrd.cpio").is_file():
        with build_dir(images_dir) as temp:
            (temp / "new").mkdir()
            (temp / "new" / "initrd.cpio").write_bytes(archive)
            publish_dir(temp / "new", target)
    return BootFiles(found.path, found.hash, target / "initrd.cpio", digest, found.package, found.kind)


def build_initrd(guestd: bytes, modules: list[tuple[str, bytes]]) -> bytes:
    """Return the initial root: guestd as /init, modules below /modules, their load order in /modules/order."""
    entries = [cpio.directory(name) for name in ("dev", "modules", "proc", "sys")]
    entries.append(cpio.device("dev/console", 5, 1))  # the kernel opens it for /init before anything is mounted
    entries.append(cpio.file("init", guestd, executable=True))
    entries.extend(cpio.file(f"modules/{name}", data) for name, data in modules)
    order = "".join(f"/modules/{name}\n" for name, _data in modules)
    entries.append(cpio.file("modules/order", order.encode()))
    return cpio.archive(entries)
