"""The kernel and the initial root that machines boot: fetched from Debian once, content-addressed, rebuilt offline.

    kernel/current.json              which kernel new templates use
    kernel/HASH/vmlinux              the kernel proper, uncompressed ELF (HASH: BLAKE3-256 of it)
    kernel/HASH/modules/NN-name.ko   the few modules a guest needs, in load order
    initrd/HASH/initrd.cpio          guestd as /init, the modules, /modules/order

A new guestd gives a new initrd in milliseconds, without a network. This module must know nothing of VMMs: which
devices a machine has shows only in the list of modules.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from recess.errors import Corrupt, MissingTool, Unavailable
from recess.images import cpio, kernel
from recess.images.files import build_dir, hash_bytes, publish_dir, read_json, write_json
from recess.images.tools import Progress, run_tool

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
# Transport, console and disk first: a machine without its root is told apart sooner. virtio_pci serves q35.
WANTED_MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_console", "erofs", "overlay", "virtio_net")
_VERSION = 1


@dataclass(frozen=True)
class BootFiles:
    """A kernel and an initial root on this node. Hashes are BLAKE3-256 hex of the files."""

    kernel: Path
    kernel_hash: str
    initrd: Path
    initrd_hash: str
    kernel_package: str  # "linux-image-6.1.0-56-cloud-amd64 6.1.192-2"


@dataclass(frozen=True)
class _Kernel:
    path: Path
    hash: str
    package: str
    modules: tuple[Path, ...]


def ensure_boot_files(images_dir: Path, guestd: Path, progress: Progress = lambda _line: None) -> BootFiles:
    """Return the boot files for this guestd; fetches the kernel package if there is no kernel yet.

    May be called at any time, also by two processes at once. Raises MissingTool (no guestd, no apt), Unavailable
    (no mirror), OutOfSpace, Corrupt.
    """
    if not guestd.is_file():
        raise MissingTool(f"guestd is not built: {guestd}", hint="run tools/setup.sh")
    found = _current_kernel(images_dir) or fetch_kernel(images_dir, progress)
    archive = build_initrd(guestd.read_bytes(), [(p.name, p.read_bytes()) for p in found.modules])
    digest = hash_bytes(archive)
    target = images_dir / "initrd" / digest
    if not (target / "initrd.cpio").is_file():
        with build_dir(images_dir) as temp:
            (temp / "new").mkdir()
            (temp / "new" / "initrd.cpio").write_bytes(archive)
            publish_dir(temp / "new", target)
    return BootFiles(found.path, found.hash, target / "initrd.cpio", digest, found.package)


def build_initrd(guestd: bytes, modules: list[tuple[str, bytes]]) -> bytes:
    """Return the initial root: guestd as /init, modules below /modules, their load order in /modules/order."""
    entries = [cpio.directory(name) for name in ("dev", "modules", "proc", "sys")]
    entries.append(cpio.device("dev/console", 5, 1))  # the kernel opens it for /init before anything is mounted
    entries.append(cpio.file("init", guestd, executable=True))
    entries.extend(cpio.file(f"modules/{name}", data) for name, data in modules)
    order = "".join(f"/modules/{name}\n" for name, _data in modules)
    entries.append(cpio.file("modules/order", order.encode()))
    return cpio.archive(entries)


def _current_kernel(images_dir: Path) -> _Kernel | None:
    try:
        found = read_json(images_dir / "kernel" / "current.json", _VERSION)
    except FileNotFoundError:
        return None
    digest, package = str(found.get("hash", "")), str(found.get("package", ""))
    folder = images_dir / "kernel" / digest
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or not (folder / "vmlinux").is_file():
        raise Corrupt(f"the kernel {digest[:12]} is not in {folder.parent}", hint="remove kernel/current.json there")
    return _Kernel(folder / "vmlinux", digest, package, tuple(sorted((folder / "modules").glob("*.ko"))))


def fetch_kernel(images_dir: Path, progress: Progress) -> _Kernel:
    """Download Debian's cloud kernel (no root needed), take out what guests need, and make it the current one.

    Earlier kernels stay: snapshots may name them. Raises MissingTool, Unavailable, OutOfSpace, Corrupt.
    """
    with build_dir(images_dir) as temp:
        progress(f"downloading Debian's cloud kernel ({KERNEL_METAPACKAGE})")
        package = _download(temp)
        version = run_tool(["dpkg-deb", "--field", package, "Package", "Version"])
        name = " ".join(re.findall(r"^\w+: (\S+)$", version, re.MULTILINE))
        progress(f"unpacking {name}")
        image, modules, built_in = read_package(_package_tar(package, temp))
        elf = kernel.extract_vmlinux(image)
        digest = hash_bytes(elf)
        folder = temp / "new"
        (folder / "modules").mkdir(parents=True)
        (folder / "vmlinux").write_bytes(elf)
        for number, module in enumerate(kernel.load_order(modules, built_in, WANTED_MODULES)):
            (folder / "modules" / f"{number:02}-{module}.ko").write_bytes(modules[module])
        publish_dir(folder, images_dir / "kernel" / digest)
    write_json(images_dir / "kernel" / "current.json", {"version": _VERSION, "hash": digest, "package": name})
    found = _current_kernel(images_dir)
    if found is None:
        raise Corrupt("the kernel vanished while it was being stored")
    return found


def _download(folder: Path) -> Path:
    """Download the newest cloud kernel package into the folder, with the host's lists or, without any, our own."""
    options: list[str] = ["-o", "APT::Sandbox::User=root"]  # the folder is private: apt must not switch user
    try:
        _download_with(options, folder)
    except Unavailable:  # no lists, or lists so old that the package is gone from the mirror
        state = folder / "apt"
        (state / "lists" / "partial").mkdir(parents=True)
        (state / "cache" / "archives" / "partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        run_tool(["apt-get", *options, "-q", "update"])
        _download_with(options, folder)
    found = sorted(folder.glob("linux-image-*.deb"))
    if not found:
        raise Unavailable("apt-get download left no kernel package")
    return found[0]


def _download_with(options: list[str], folder: Path) -> None:
    run_tool(["apt-get", *options, "-q", "download", _concrete_package(options)], cwd=folder)


def _concrete_package(options: list[str]) -> str:
    text = run_tool(["apt-cache", *options, "depends", KERNEL_METAPACKAGE])
    match = re.search(r"Depends: (linux-image-\S+)", text)
    if match is None:
        raise Unavailable(f"apt knows no {KERNEL_METAPACKAGE}", hint="use Debian's own package sources")
    return match[1]


def _package_tar(package: Path, folder: Path) -> bytes:
    tar = folder / "package.tar"
    run_tool(["sh", "-c", 'dpkg-deb --fsys-tarfile "$0" > "$1"', package, tar])
    return tar.read_bytes()


def read_package(tar: bytes) -> tuple[bytes, dict[str, bytes], frozenset[str]]:
    """Return (boot image, modules by name, names built in) of a kernel package's tree. Raises Corrupt."""
    image = b""
    modules: dict[str, bytes] = {}
    built_in: frozenset[str] = frozenset()
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                handle = archive.extractfile(member) if member.isfile() else None
                if handle is None:
                    continue
                if path.startswith("boot/vmlinuz-"):
                    image = handle.read()
                elif path.endswith("/modules.builtin"):
                    built_in = frozenset(kernel.module_name(line) for line in handle.read().decode().split())
                elif ".ko" in path and _may_be_needed(path):
                    modules[kernel.module_name(path)] = kernel.module_bytes(path, handle.read())
    except tarfile.TarError as exc:
        raise Corrupt(f"the kernel package cannot be read: {exc}") from exc
    if not image or not modules:
        raise Corrupt("the kernel package holds no kernel or no modules")
    return image, modules, built_in


def _may_be_needed(path: str) -> bool:
    """Skip the bulk that a guest never needs, before it is read."""
    return any(part in path for part in ("/virtio", "/fs/", "/lib/", "/net/", "/block/", "/char/", "/crypto/"))
