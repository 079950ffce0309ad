"""Images from elsewhere: registries, archives of `docker save`, OCI layouts, plain archives of a root, Dockerfiles.

Registries and archives are read by skopeo, Dockerfiles built by buildah: both are kept by the people who keep Podman, are in
Debian, and know tokens, mirrors, Docker's own logins and every form of manifest. They only fetch, into an OCI layout; what
is in it is unpacked by `oci` and `layers`. Why these: docs/decisions/images.md.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recess.errors import BadInput, NotFound, Refused, Unavailable
from recess.images import erofs
from recess.images.layers import Tree, append_layer
from recess.images.oci import ARCHITECTURE, SYSTEM, make_root, read_layout, with_folders
from recess.images.store import LATEST, ImageInfo, ImageStore
from recess.images.tools import Progress, run_tool
from recess.images.unpack import write_layout

_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::[0-9]{1,5})?"
_PATH = r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*"
_REFERENCE = re.compile(rf"(?:{_HOST}/)?{_PATH}(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?")
_LOCAL = re.compile(r"(?:localhost|127\.[0-9.]+|\[::1\])(?::[0-9]+)?/")
_LAYOUT = "layout"
_NAMED = re.compile(r"^[ \t]*FROM[ \t]+(?:--\S+[ \t]+)*(\S+)|--from=(\S+)", re.IGNORECASE | re.MULTILINE)
_ARGUMENT = re.compile(r"^[ \t]*ARG[ \t]+\w+=[\"']?([^\s\"']+)", re.IGNORECASE | re.MULTILINE)
_LOCAL_REGISTRY = re.compile(r"(?<![\w.-])((?:localhost|127\.[0-9.]+)(?::[0-9]+)?)/")
REGISTRIES_CONF = Path("/etc/containers/registries.conf")


@dataclass(frozen=True)
class Found:
    """A root image that was made, and what its metadata will say of it."""

    root: Path
    config: dict[str, Any]
    source: str


def with_tag(reference: str) -> str:
    """Return a reference with Docker's tag `latest` if it has neither tag nor digest. Raises BadInput."""
    if not _REFERENCE.fullmatch(reference) or len(reference) > 255:
        raise BadInput(f"not an image reference: {reference[:80]!r}", hint="[HOST[:PORT]/]NAME[:TAG|@DIGEST]")
    last = reference.rpartition("/")[2]
    return reference if ":" in last or "@" in last else f"{reference}:{LATEST}"


def copy_command(source: str, layout: Path, *, insecure: bool) -> list[str]:
    """Return the command line that copies an image into an OCI layout, as it is: layers are not compressed anew. Pure."""
    options = ["--insecure-policy", f"--override-os={SYSTEM}", f"--override-arch={ARCHITECTURE}"]
    tls = ["--src-tls-verify=false"] if insecure else []
    return ["skopeo", *options, "copy", "--quiet=false", *tls, source, f"oci:{layout}:{_LAYOUT}"]


def registries_conf(hosts: str, *texts: str) -> str:
    """Return what buildah has to know of registries to build from these texts (a Dockerfile, its arguments): what the host's
    configuration says, that a bare name is Docker Hub's unless it says otherwise, and that a registry on this host needs no
    TLS (containers-registries.conf(5), version 2). Pure."""
    local = sorted({found for text in texts for found in _LOCAL_REGISTRY.findall(text)})
    tables = [f'\n[[registry]]\nlocation = "{place}"\ninsecure = true\n' for place in local if place not in hosts]
    search = (
        ""
        if "unqualified-search-registries" in re.sub(r"#.*", "", hosts)
        else 'unqualified-search-registries = ["docker.io"]\n'
    )
    return search + hosts + "".join(tables)


def bases(dockerfile: str, arguments: Sequence[str] = ()) -> list[str]:
    """Return what a Dockerfile may mean by an image's name, in `FROM` and `--from`, variables' values among them; some are
    stages or nothing. Pure."""
    named = [one for pair in _NAMED.findall(dockerfile) for one in pair if one and "$" not in one]
    told = [*_ARGUMENT.findall(dockerfile), *(text.partition("=")[2] for text in arguments)]
    return [one for one in dict.fromkeys([*named, *told]) if _REFERENCE.fullmatch(one)]


def lent_name(name: str) -> str:
    """Return what buildah finds an image of ours by: a name without a registry is looked for on `localhost` first. Pure."""
    first, slash, _ = name.partition("/")
    place = slash and (first == "localhost" or "." in first or ":" in first)
    return with_tag(name if place else f"localhost/{name}")


def _hosts_conf() -> str:
    try:
        return REGISTRIES_CONF.read_text(errors="replace")
    except OSError:
        return ""  # none there, or not for this user


def explain(error: Unavailable, reference: str) -> Unavailable | NotFound | Refused:
    """Return skopeo's failure in our words."""
    log = str(error.details.get("log", ""))
    if re.search(r"manifest unknown|not found|name unknown|repository name not known", log, re.IGNORECASE):
        return NotFound(f"no image {reference} there", hint="is it spelled so?", kind="image", ref=reference)
    if re.search(r"unauthorized|authentication required|denied", log, re.IGNORECASE):
        return Refused(
            f"the registry lets nobody have {reference} without a login, or not this user",
            hint="docker login, podman login or skopeo login on the server's host; it reads ~/.docker/config.json", log=log,
        )  # fmt: skip
    if re.search(r"no image found in .* for architecture|no image found in manifest list", log):
        return NotFound(f"image {reference} has nothing for {SYSTEM}/{ARCHITECTURE}", kind="image", ref=reference)
    if re.search(r"dial tcp|lookup|connection refused|no such host|i/o timeout|TLS|x509|HTTP response", log):
        return Unavailable(
            f"the registry of {reference} cannot be reached", hint="check name, network and proxy", log=log
        )
    return error


class Sources:
    """Takes images from elsewhere into a store. All calls block for long."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    def pull(
        self, reference: str, progress: Progress, *, name: str = "", insecure: bool = False,
        cancel: threading.Event | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Take an image from a registry; it is called as it was asked for. Registries on this host need no TLS.

        Raises NotFound, Refused (a login is needed), Unavailable, Corrupt, MissingTool, OutOfSpace, BadInput.
        """
        wanted = with_tag(reference)
        insecure = insecure or _LOCAL.match(wanted) is not None

        def fetch(work: Path) -> Found:
            progress(f"pulling {wanted}")
            try:
                self._copy(f"docker://{wanted}", work / _LAYOUT, progress, insecure, cancel)
            except Unavailable as exc:
                raise explain(exc, wanted) from exc
            return _of_layout(work / _LAYOUT, _LAYOUT, work, progress, f"docker://{wanted}")

        return self._put(name or wanted, fetch, progress)

    def take_in(
        self, source: Path, name: str, progress: Progress, *, config: Mapping[str, Any] | None = None,
        cancel: threading.Event | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Take an image from a folder (an OCI layout) or a file (`docker save`, an OCI archive, or a tar of a whole root,
        plain or compressed) and call it `name`. `config`: how to start a root that does not say. Raises as `pull`."""

        def read(work: Path) -> Found:
            found = self._read(source, work, progress, cancel)
            return replace(found, config=found.config or dict(config or {}))

        return self._put(with_tag(name), read, progress)

    def _read(self, source: Path, work: Path, progress: Progress, cancel: threading.Event | None) -> Found:
        if source.is_dir():
            return _of_layout(source, "", work, progress, f"oci:{source.name}")
        if not source.is_file():
            raise BadInput(f"{source}: no such file or folder")
        kind = archive_kind(source)
        if kind == "root":
            return _of_root(source, work, progress)
        self._copy(f"{kind}:{source}", work / _LAYOUT, progress, False, cancel)
        return _of_layout(work / _LAYOUT, _LAYOUT, work, progress, f"{kind}:{source.name}")

    def build(
        self, context: Path, dockerfile: Path, name: str, progress: Progress, *, arguments: tuple[str, ...] = (),
        target: str = "", cancel: threading.Event | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Build a Dockerfile (its stage `target`, "": the last) with buildah and call the image `name`. What it names is an
        image of this store, if there is one, else a registry's; registries on this host need no TLS. Raises MissingTool, Unavailable (the build failed)."""
        if not context.is_dir() or not dockerfile.is_file():
            raise BadInput(f"{context}: no such folder, or no {dockerfile.name} in it")

        def make(work: Path) -> Found:
            layout = work / _LAYOUT
            store = ["--root", str(work / "store"), "--runroot", str(work / "run"), "--storage-driver", "vfs"]
            words = [word for one in arguments for word in ("--build-arg", one)]
            words += ["--target", target] if target else []
            tag = "localhost/recess-build"
            conf = work / "registries.conf"
            text = dockerfile.read_text(errors="replace")
            conf.write_text(registries_conf(_hosts_conf(), text, *arguments))
            self._lend(bases(text, arguments), ["buildah", *store], work / "bases", progress, cancel)
            run_tool(
                ["buildah", "--registries-conf", str(conf), *store, "bud", "--isolation", "chroot", "--format", "oci",
                 *words, "-t", tag, "-f", str(dockerfile), str(context)],
                progress=progress, cancel=cancel,
            )  # fmt: skip
            run_tool(["buildah", *store, "push", tag, f"oci:{layout}:{_LAYOUT}"], cancel=cancel)
            return _of_layout(layout, _LAYOUT, work, progress, f"dockerfile:{dockerfile.name}")

        return self._put(with_tag(name), make, progress)

    def _lend(
        self, names: Sequence[str], buildah: Sequence[str], folder: Path, progress: Progress, cancel: threading.Event | None
    ) -> None:  # fmt: skip
        """Give buildah's own store those of the names that are images here: what is there it asks no registry for."""
        for number, name in enumerate(names):
            try:
                info = self._store.get(name)
            except (NotFound, BadInput):
                continue
            progress(f"{name} is an image here")
            layout = folder / str(number)
            image = write_layout(info.root_path, info.config, layout, _LAYOUT)
            run_tool([*buildah, "pull", f"oci:{layout}:{_LAYOUT}"], cancel=cancel)
            run_tool([*buildah, "tag", image, lent_name(name)], cancel=cancel)
            shutil.rmtree(layout)

    def _copy(
        self, source: str, layout: Path, progress: Progress, insecure: bool, cancel: threading.Event | None
    ) -> None:
        run_tool(copy_command(source, layout, insecure=insecure), progress=_steps(progress), cancel=cancel)

    def _put(self, name: str, make: Callable[[Path], Found], progress: Progress) -> ImageInfo:
        about: dict[str, Any] = {}

        def root(work: Path) -> Path:
            found = make(work)
            about.update(config=found.config, source=found.source)
            return found.root

        return self._store.put(name, root, about, progress)


def _steps(progress: Progress) -> Progress:
    """Pass on which blob skopeo is at."""

    def line(text: str) -> None:
        found = re.match(r"(Copying (?:blob|config)) (?:sha256:)?([0-9a-f]{12})", text)
        if found:
            progress(f"{found[1].lower()} {found[2]}")

    return line


def _of_layout(folder: Path, name: str, work: Path, progress: Progress, source: str) -> Found:
    image = read_layout(folder, name)
    root = make_root(image, work, progress)
    return Found(root, dict(image.config), f"{source}@{image.digest}")


def _of_root(source: Path, work: Path, progress: Progress) -> Found:
    progress("unpacking the root")
    archive, layers = work / "layers.tar", Tree()
    with archive.open("w+b") as out, source.open("rb") as blob:
        begin = append_layer(blob, out)
    layers.add(archive, begin)
    target = work / "root.erofs"
    erofs.write_image(with_folders(layers.nodes()), archive, target)
    archive.unlink()
    return Found(target, {}, f"archive:{source.name}")


def archive_kind(source: Path) -> str:
    """Return what skopeo calls an archive: "docker-archive", "oci-archive"; "root" for a tar of a whole file system."""
    names: set[str] = set()
    try:
        with tarfile.open(source, "r:*") as tar:
            for _ in range(2000):
                member = tar.next()
                if member is None:
                    break
                names.add(member.name.removeprefix("./"))
                if "manifest.json" in names:
                    return "docker-archive"
    except (tarfile.TarError, OSError, EOFError):
        return "root"  # perhaps zstd, which tarfile does not know: `append_layer` tells
    return "oci-archive" if "oci-layout" in names else "root"
