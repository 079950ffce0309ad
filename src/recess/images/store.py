"""Root images by name: content-addressed files, one small metadata file per name, no database.

    names/NAME.json          name -> root hash, packages, size, created (NAME percent-quoted)
    roots/HASH/root.erofs    the image (HASH: BLAKE3-256 of the file), with root.erofs.pages beside it

Publish order: root, then name; a name therefore never points at nothing, and a crash in between leaves a root that
no name uses, which the next `remove` sweeps; both hold the lock of `names/`, so that no sweep comes between a root and
its name. Two processes may create images at once; of the same name the last one wins. This module must know nothing of machines or snapshots: who still needs a root is told to it.
"""

from __future__ import annotations

import builtins
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

from recess.errors import BadInput, Conflict, Corrupt, HasDependents, NameInUse, NotFound
from recess.images import debian
from recess.images.files import build_dir, hash_file, locked, publish_dir, read_json, write_json
from recess.images.pages import FilePages
from recess.images.tools import Progress

BASE_IMAGE = "base"
LATEST = "latest"
_FILE_NAME_MAX = 240
_VERSION = 1
_NAME = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]{0,159}")


@dataclass(frozen=True)
class ImageInfo:
    """One image. `root_hash` is BLAKE3-256 hex of the file at `root_path`; `created` in wall seconds."""

    name: str
    root_path: Path
    root_hash: str
    packages: tuple[str, ...]
    size_bytes: int
    created: float
    config: Mapping[str, Any] = field(default_factory=dict)  # how it wants to be started, in the OCI's words
    source: str = ""  # where it came from, with the digest of what it was made of


Making = Callable[[Path], Path]
"""Makes a root image somewhere below the folder it is given and returns its path."""


class RootBuilder(Protocol):
    """Makes a root image of packages somewhere below `work` and returns its path; see `debian.build_root`."""

    def __call__(
        self, packages: Sequence[str], work: Path, progress: Progress, *, cancel: threading.Event | None
    ) -> Path:
        """Build; slow."""
        ...


def _silent(_line: str) -> None:
    return


class ImageStore:
    """The images below one folder. All calls are synchronous; only `create` is slow (minutes, network)."""

    def __init__(self, images_dir: Path, build: RootBuilder = debian.build_root) -> None:
        self._build = build
        self._dir = images_dir
        self._names = images_dir / "names"
        self._roots = images_dir / "roots"

    def create(
        self,
        name: str,
        packages: Sequence[str] = (),
        progress: Progress = _silent,
        *,
        with_base: bool = True,
        replace: bool = False,
        cancel: threading.Event | None = None,
    ) -> ImageInfo:
        """Build an image of Debian packages and give it a name. Nothing is left behind unless it returns.

        `with_base=False` leaves out Python, git and the other packages of `base`. Raises BadInput, NameInUse
        (without `replace`), MissingTool, Unavailable, OutOfSpace; KeyboardInterrupt when cancelled.
        """
        path = self._name_path(name)
        wanted = debian.check_packages([*packages, *(debian.BASE_PACKAGES if with_base else ())])
        if path.exists() and not replace:
            raise NameInUse(f"an image named {name!r} exists", hint="remove it first, or use another name")
        return self.put(
            name, lambda work: self._build(wanted, work, progress, cancel=cancel), {"packages": list(wanted)},
            progress, replace=True,
        )  # fmt: skip

    def put(
        self, name: str, make: Making, about: Mapping[str, Any], progress: Progress = _silent, *, replace: bool = True
    ) -> ImageInfo:
        """Make a root and give it a name; `about`: what else its metadata says (packages, config, source).

        Nothing is left behind unless it returns. Without `replace` a name in use is NameInUse. Errors of `make` as well.
        """
        path = self._name_path(name)
        with build_dir(self._dir) as work:
            root = make(work)
            progress("indexing the root image")
            folder = work / "new"
            folder.mkdir()
            digest = hash_file(root)
            root.chmod(0o444)
            root = root.rename(folder / "root.erofs")
            FilePages.open(root, digest).close()
            with locked(self._names):
                publish_dir(folder, self._roots / digest)
                size = (self._roots / digest / "root.erofs").stat().st_size
                if path.exists() and not replace:
                    raise NameInUse(f"an image named {name!r} exists", hint="remove it first, or use another name")
                found = {"root_hash": digest, "size_bytes": size, "created": time.time()}
                write_json(path, {"packages": [], **about, "version": _VERSION, "name": name, **found})
        return self.get(name)

    def tag(self, name: str, further: str) -> ImageInfo:
        """Give an image a further name; another image that has it loses it. Raises NotFound, BadInput, Corrupt."""
        info, path = self.get(name), self._name_path(further)
        with locked(self._names):
            found = read_json(self._name_path(name), _VERSION)
            if found.get("root_hash") != info.root_hash:
                raise Conflict(f"image {name!r} was changed meanwhile", hint="try again")
            write_json(path, {**found, "name": further})
        return self.get(further)

    def ensure_base(self, progress: Progress = _silent) -> ImageInfo:
        """Return the image `base`, building it first if it is not there. Errors as `create`."""
        try:
            return self.get(BASE_IMAGE)
        except NotFound:
            return self.create(BASE_IMAGE, (), progress, replace=True)

    def get(self, name: str) -> ImageInfo:
        """Return one image. Raises NotFound with the names there are, Corrupt for damaged metadata or a lost root."""
        path = self._name_path(name)
        if not path.exists() and ":" not in name.rpartition("/")[2] and self._name_path(f"{name}:{LATEST}").exists():
            name = f"{name}:{LATEST}"  # as Docker has it
            path = self._name_path(name)
        try:
            found = read_json(path, _VERSION)
        except FileNotFoundError:
            known = ", ".join(self._known()[:8])
            hint = f"recess pull {name}; there are: {known}" if known else "recess images create base"
            raise NotFound(f"no image named {name!r}", hint=hint, kind="image", ref=name) from None
        info = self._parse(name, found, path)
        try:
            size = info.root_path.stat().st_size
        except FileNotFoundError:
            raise Corrupt(f"image {name!r}: its root is missing", hint=f"recess images rm {name}, create it") from None
        if size != info.size_bytes:
            raise Corrupt(f"image {name!r}: its root has {size} bytes, not {info.size_bytes}", hint="create it again")
        return info

    inspect = get

    def list(self) -> Sequence[ImageInfo]:
        """Return all images by name. Raises Corrupt as `get`."""
        return [self.get(name) for name in self._known()]

    def survey(self) -> tuple[Sequence[ImageInfo], Sequence[tuple[str, Corrupt]]]:
        """Return the images that can be read, by name, and apart the names of those that cannot, with why."""
        good: builtins.list[ImageInfo] = []
        damaged: builtins.list[tuple[str, Corrupt]] = []
        for name in self._known():
            try:
                good.append(self.get(name))
            except Corrupt as exc:
                damaged.append((name, exc))
        return good, damaged

    def verify(self, name: str) -> None:
        """Re-hash an image's root. Raises Corrupt when it is not what was built."""
        info = self.get(name)
        if hash_file(info.root_path) != info.root_hash:
            raise Corrupt(f"image {name!r}: its root is damaged", hint=f"recess images rm {name}, then create it")

    def root(self, root_hash: str) -> Path:
        """Return the root file of a content hash, also of an image whose name is gone. Raises NotFound."""
        path = self._roots / root_hash / "root.erofs"
        if not re.fullmatch(r"[0-9a-f]{64}", root_hash) or not path.is_file():
            raise NotFound(f"no root image {root_hash[:12]}", kind="root", ref=root_hash)
        return path

    def pages(self, root_hash: str) -> FilePages:
        """Return the page source of a root; the caller closes it. Raises NotFound."""
        return FilePages.open(self.root(root_hash), root_hash)

    def remove(self, name: str, *, in_use: Collection[str] = ()) -> None:
        """Forget a name, and delete the root if no other name has it.

        `in_use`: root hashes that machines, templates or snapshots still need; a root that has another name as well stays
        anyway. Raises NotFound, HasDependents. Works on an image whose metadata is damaged, too.
        """
        path = self._name_path(name)
        if not path.exists():
            self.get(name)
        if self.only_name_of(name) in in_use:
            raise HasDependents(f"image {name!r} is in use", hint="remove its machines and snapshots first", ref=name)
        with locked(self._names):
            path.unlink(missing_ok=True)
            self._sweep(in_use)

    def only_name_of(self, name: str) -> str:
        """Return the root hash that has no name but this, "" if it has others, or cannot be told."""
        digest = self._hash_of(self._name_path(name))
        return "" if any(self._hash_of(self._name_path(n)) == digest for n in self._known() if n != name) else digest

    def sweep(self, *, in_use: Collection[str] = ()) -> int:
        """Delete roots that no name and nobody in `in_use` refers to; return the bytes freed. While there is a name whose
        metadata cannot be read, nothing goes: any root may be its own."""
        with locked(self._names):
            return self._sweep(in_use)

    def _sweep(self, in_use: Collection[str]) -> int:
        named = {self._hash_of(self._name_path(n)) for n in self._known()}
        if "" in named:
            return 0
        freed = 0
        for folder in self._roots.iterdir() if self._roots.is_dir() else ():
            if folder.name not in named and folder.name not in in_use:
                freed += sum(p.stat().st_size for p in folder.iterdir())
                shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _known(self) -> Sequence[str]:
        if not self._names.is_dir():
            return []
        return sorted(unquote(p.name.removesuffix(".json")) for p in self._names.glob("[!.]*.json"))

    def _name_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or len(quote(name, safe="")) > _FILE_NAME_MAX:
            raise BadInput(
                f"not an image name: {name[:80]!r}", hint="letters, digits and . _ - / : @, as registries have them"
            )
        return self._names / f"{quote(name, safe='')}.json"

    def _hash_of(self, path: Path) -> str:
        try:
            return str(read_json(path, _VERSION).get("root_hash", ""))
        except (Corrupt, FileNotFoundError):
            return ""

    def _parse(self, name: str, found: dict[str, object], path: Path) -> ImageInfo:
        digest, packages = found.get("root_hash"), found.get("packages")
        size, created = found.get("size_bytes"), found.get("created")
        config, source = found.get("config", {}), found.get("source", "")
        if (
            not isinstance(digest, str)
            or not re.fullmatch(r"[0-9a-f]{64}", digest)
            or not isinstance(packages, list)
            or not isinstance(size, int)
            or not isinstance(created, int | float)
            or not isinstance(config, dict)
            or found.get("name") != name
        ):
            raise Corrupt(f"image {name!r}: damaged metadata in {path}", hint=f"recess images rm {name}, create it")
        root = self._roots / digest / "root.erofs"
        return ImageInfo(name, root, digest, tuple(map(str, packages)), size, float(created), config, str(source))
