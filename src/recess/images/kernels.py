"""The kernels of this node: kept by content, known by kind, and which of them a new machine starts from.

    kernel/HASH/vmlinux              the kernel proper, uncompressed ELF (HASH: BLAKE3-256 of it)
    kernel/HASH/modules/NN-name.ko   the few modules a guest needs, in load order; none in a trimmed kernel
    kernel/HASH/about.json           kind and package, for people
    kernel/current.json              which one is Debian's
    kernel/trimmed.json              which one `make kernel` built; absent until then

Kernels of before stay: snapshots name them by hash. A pointer is written last, in one step, so that it never names
what is not whole. This module must know nothing of where kernels come from, of VMMs or of machines.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recess.errors import BadInput, Corrupt, NotFound
from recess.images import kernel
from recess.images.files import build_dir, hash_bytes, publish_dir, read_json, write_json

AUTO, TRIMMED, DEBIAN, OWN = "auto", "trimmed", "debian", "own"
_POINTERS = {DEBIAN: "current.json", TRIMMED: "trimmed.json"}
_VERSION = 1
_FILE_BYTES_MAX = 256 << 20


@dataclass(frozen=True)
class Kernel:
    """One kernel here. `kind`: debian | trimmed | own (a file of the user's); `package`: what it was made from."""

    path: Path
    hash: str
    kind: str
    package: str
    modules: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """One line for people."""
        return f"{self.kind} ({self.package}, {self.hash[:12]})"


def current(images_dir: Path, kind: str) -> Kernel | None:
    """Return the kernel of a kind (debian | trimmed), None if there is none. Raises Corrupt when its file is gone."""
    pointer = images_dir / "kernel" / _POINTERS[kind]
    try:
        found = read_json(pointer, _VERSION)
    except FileNotFoundError:
        return None
    digest, package = str(found.get("hash", "")), str(found.get("package", ""))
    folder = images_dir / "kernel" / digest
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or not (folder / "vmlinux").is_file():
        raise Corrupt(f"the kernel {digest[:12]} is not in {folder.parent}", hint=f"remove {pointer}")
    return Kernel(folder / "vmlinux", digest, kind, package, _modules(folder))


def choose(images_dir: Path, wanted: str, fetch: Callable[[], Kernel]) -> Kernel:
    """Return the kernel that new machines start from.

    `wanted`: `auto` (the trimmed one if it was built, else Debian's), `trimmed`, `debian`, or the path of a kernel file
    with everything built in. `fetch` gets Debian's when it is needed and not there. Raises NotFound (no trimmed
    kernel, no such file), BadInput (an unknown word), Corrupt (no kernel in the file), and what `fetch` raises.
    """
    if "/" in wanted:
        return _own(images_dir, Path(wanted).expanduser())
    if wanted not in (AUTO, TRIMMED, DEBIAN):
        raise BadInput(f"no such kernel: {wanted!r}", hint=f"{AUTO}, {TRIMMED}, {DEBIAN}, or a path with a slash")
    trimmed = current(images_dir, TRIMMED) if wanted != DEBIAN else None
    if trimmed is None and wanted == TRIMMED:
        raise NotFound("the trimmed kernel is not built", hint="make kernel", kind="kernel", ref=wanted)
    return trimmed or current(images_dir, DEBIAN) or fetch()


def chosen_by(images_dir: Path, wanted: str) -> list[Path]:
    """Return the files that `choose` goes by: it chooses anew when one of them has changed."""
    if "/" in wanted:
        return [Path(wanted).expanduser()]
    return [images_dir / "kernel" / name for name in _POINTERS.values()]


def stamp(paths: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    """Return size and time (ns) of each file, zeros for one that is not there."""
    out = []
    for path in paths:
        try:
            found = path.stat()
            out.append((found.st_size, found.st_mtime_ns))
        except FileNotFoundError:
            out.append((0, 0))
    return tuple(out)


def install(
    images_dir: Path, kind: str, image: bytes, package: str, modules: Sequence[tuple[str, bytes]] = ()
) -> Kernel:
    """Keep a kernel (ELF or boot image; `modules` in load order), and make it the current one of its kind.

    The pointer comes after the files; a crash in between leaves a kernel that nothing names. May be called again
    with the same. Raises Corrupt (no ELF with a PVH note in it), MissingTool, OutOfSpace.
    """
    kept = _keep(images_dir, kind, kernel.extract_vmlinux(image), package, modules)
    write_json(
        images_dir / "kernel" / _POINTERS[kind], {"version": _VERSION, "hash": kept.hash, "package": kept.package}
    )
    return kept


def describe(images_dir: Path, digest: str) -> str:
    """Return one line about the kernel of this hash, here or not, for people; never raises."""
    with contextlib.suppress(OSError, Corrupt):
        for kind in _POINTERS:
            found = current(images_dir, kind)
            if found is not None and found.hash == digest:
                return found.label
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            about = read_json(images_dir / "kernel" / digest / "about.json", _VERSION)
            return Kernel(Path(), digest, str(about.get("kind", "")), str(about.get("package", ""))).label
    return f"unknown ({digest[:12]})"


def _own(images_dir: Path, path: Path) -> Kernel:
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise Corrupt(f"{path} is too large for a kernel")
        data = path.read_bytes()
    except OSError as exc:
        raise NotFound(f"the kernel {path} cannot be read: {exc.strerror}", kind="kernel", ref=str(path)) from exc
    return _keep(images_dir, OWN, kernel.extract_vmlinux(data), path.name, ())


def _keep(images_dir: Path, kind: str, elf: bytes, package: str, modules: Sequence[tuple[str, bytes]]) -> Kernel:
    digest = hash_bytes(elf)
    folder = images_dir / "kernel" / digest
    if not (folder / "vmlinux").is_file():
        with build_dir(images_dir) as temp:
            new = temp / "new"
            (new / "modules").mkdir(parents=True)
            (new / "vmlinux").write_bytes(elf)
            for number, (name, data) in enumerate(modules):
                (new / "modules" / f"{number:02}-{name}.ko").write_bytes(data)
            write_json(new / "about.json", {"version": _VERSION, "kind": kind, "package": package})
            publish_dir(new, folder)
    return Kernel(folder / "vmlinux", digest, kind, package, _modules(folder))


def _modules(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted((folder / "modules").glob("*.ko")))
