"""Debian's cloud kernel: downloaded as a package (no root needed), taken apart, and kept. The default without a build.

The host's own lists and mirrors are used. This module must know nothing of initial roots or of who boots the kernel.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

from recess.errors import Corrupt, Unavailable
from recess.images import kernel, kernels
from recess.images.files import build_dir
from recess.images.tools import Progress, run_tool

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
# Transport, console and disk first: a machine without its root is told apart sooner. virtio_pci serves q35.
WANTED_MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "erofs",
    "overlay",
    "virtio_net",
    "vmw_vsock_virtio_transport",
)


def fetch_kernel(images_dir: Path, progress: Progress) -> kernels.Kernel:
    """Download Debian's cloud kernel, take out what guests need, and make it the current one of its kind.

    Raises MissingTool, Unavailable, OutOfSpace, Corrupt.
    """
    with build_dir(images_dir) as temp:
        name, tar = fetch_package(temp, progress)
        image, modules, built_in = read_package(tar)
    order = kernel.load_order(modules, built_in, WANTED_MODULES)
    return kernels.install(images_dir, kernels.DEBIAN, image, name, [(m, modules[m]) for m in order])


def fetch_package(folder: Path, progress: Progress, *, source: str = "") -> tuple[str, bytes]:
    """Download the newest package into the folder; return its name with its version, and its files as a tar archive.

    `source`: one line as in apt's sources, to take it from there and from nowhere else. Raises MissingTool, Unavailable,
    OutOfSpace.
    """
    progress(f"downloading Debian's cloud kernel ({KERNEL_METAPACKAGE})")
    package = _download(folder, source)
    version = run_tool(["dpkg-deb", "--field", package, "Package", "Version"])
    name = " ".join(re.findall(r"^\w+: (\S+)$", version, re.MULTILINE))
    progress(f"unpacking {name}")
    return name, _package_tar(package, folder)


def _download(folder: Path, source: str) -> Path:
    """Download the newest cloud kernel package into the folder, with the host's lists or, without any, our own."""
    options: list[str] = ["-o", "APT::Sandbox::User=root"]  # the folder is private: apt must not switch user
    if source:
        (folder / "sources.list").write_text(f"{source}\n")
        options += ["-o", f"Dir::Etc::sourcelist={folder}/sources.list", "-o", "Dir::Etc::sourceparts=/dev/null"]
        _download_with(_own_lists(options, folder), folder)
    else:
        try:
            _download_with(options, folder)
        except Unavailable:  # no lists, or lists so old that the package is gone from the mirror
            _download_with(_own_lists(options, folder), folder)
    found = sorted(folder.glob("linux-image-*.deb"))
    if not found:
        raise Unavailable("apt-get download left no kernel package")
    return found[0]


def _own_lists(options: list[str], folder: Path) -> list[str]:
    state = folder / "apt"
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True)
    options = [*options, "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    run_tool(["apt-get", *options, "-q", "update"])
    return options


def _download_with(options: list[str], folder: Path) -> None:
    run_tool(["apt-get", *options, "-q", "download", _concrete_package(options)], cwd=folder)


def _concrete_package(options: list[str]) -> str:
    log = ""
    try:
        match = re.search(
            r"Depends: (linux-image-\S+)", run_tool(["apt-cache", *options, "depends", KERNEL_METAPACKAGE])
        )
    except Unavailable as exc:  # apt takes a mirror that cannot be reached for one that has nothing
        match, log = None, str(exc.details.get("log", ""))
    if match is None:
        raise Unavailable(
            f"apt finds no {KERNEL_METAPACKAGE}: the package mirror cannot be reached, or is not Debian's",
            hint="check the network, proxy and apt's sources",
            log=log,
        )
    return match[1]


def _package_tar(package: Path, folder: Path) -> bytes:
    tar = folder / "package.tar"
    run_tool(["sh", "-c", 'dpkg-deb --fsys-tarfile "$0" > "$1"', package, tar])
    return tar.read_bytes()


def read_package(tar: bytes, more: str = "") -> tuple[bytes, dict[str, bytes], frozenset[str]]:
    """Return (boot image, modules by name, names built in) of a kernel package's tree. Raises Corrupt.

    Of the modules only those that a guest may need, and those with `more` in their path.
    """
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
                elif ".ko" in path and (_may_be_needed(path) or (more and more in path)):
                    modules[kernel.module_name(path)] = kernel.module_bytes(path, handle.read())
    except tarfile.TarError as exc:
        raise Corrupt(f"the kernel package cannot be read: {exc}") from exc
    if not image or not modules:
        raise Corrupt("the kernel package holds no kernel or no modules")
    return image, modules, built_in


def _may_be_needed(path: str) -> bool:
    """Skip the bulk that a guest never needs, before it is read."""
    return any(part in path for part in ("/virtio", "/fs/", "/lib/", "/net/", "/block/", "/char/", "/crypto/"))
