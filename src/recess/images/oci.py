"""An OCI image layout on this disk (image-spec/image-layout.md) as a root image: which manifest, are the bytes what their
digests say, how does it want to be started.

The layout is what skopeo wrote, or anybody's folder: every size is bounded before anything is read, every blob is hashed
against its digest. This module must know nothing of registries or of image names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from recess.errors import BadInput, Corrupt, NotFound
from recess.images import erofs, tree
from recess.images.layers import ROOT_BYTES_MAX, Tree, append_layer, check_count
from recess.images.tools import Progress
from recess.units import MIB, format_bytes

ARCHITECTURE, SYSTEM = "amd64", "linux"
_JSON_BYTES_MAX = 8 * MIB
_DEPTH_MAX = 4  # an index may name indexes
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_CONFIG_KEYS = ("Entrypoint", "Cmd", "Env", "WorkingDir", "User", "ExposedPorts", "Labels", "StopSignal", "Volumes")
_FOLDERS = ("dev", "etc", "proc", "run", "sys", "tmp")  # that guestd mounts over or writes to


@dataclass(frozen=True)
class OciImage:
    """One image of a layout. `config`: the part of its configuration that says how to start it; `digest` of the manifest."""

    digest: str
    layers: tuple[Path, ...]
    config: Mapping[str, Any]
    compressed_bytes: int


def read_layout(folder: Path, name: str = "") -> OciImage:
    """Return the image for this kind of machine (linux, amd64), of several the one that is called `name`.

    Raises NotFound (none for us), Corrupt (a digest or a size does not hold), BadInput (no layout at all).
    """
    try:
        marker = _read_json(folder / "oci-layout")
    except Corrupt:
        raise BadInput(f"{folder} is no OCI image layout", hint="it has no file oci-layout") from None
    if not str(marker.get("imageLayoutVersion", "")).startswith("1."):
        raise BadInput(f"{folder}: an image layout of an unknown version")
    manifest, digest = _manifest(folder, _read_json(folder / "index.json"), name, 0)
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not isinstance(manifest.get("config"), dict):
        raise Corrupt("the image's manifest names no layers")
    check_count(len(layers))
    config = _load(folder, manifest["config"])[0]
    paths = tuple(_blob(folder, layer) for layer in layers)
    return OciImage(digest, paths, _startup(config), sum(path.stat().st_size for path in paths))


def _manifest(folder: Path, index: Mapping[str, Any], name: str, depth: int) -> tuple[dict[str, Any], str]:
    rows = [row for row in index.get("manifests") or [] if isinstance(row, dict) and _suits(row)]
    if name:
        named = [row for row in rows if (row.get("annotations") or {}).get("org.opencontainers.image.ref.name") == name]
        rows = named or rows
    if not rows or depth > _DEPTH_MAX:
        raise NotFound(f"the image has nothing for {SYSTEM}/{ARCHITECTURE}", kind="image", ref=name)
    found, digest = _load(folder, rows[0])
    if rows[0].get("mediaType") in _INDEX_TYPES or "manifests" in found:
        return _manifest(folder, found, "", depth + 1)
    return found, digest


def _suits(row: Mapping[str, Any]) -> bool:
    platform = row.get("platform")
    if not isinstance(platform, dict):
        return True
    return platform.get("os") == SYSTEM and platform.get("architecture") == ARCHITECTURE


def _startup(config: Mapping[str, Any]) -> dict[str, Any]:
    if (config.get("os", SYSTEM), config.get("architecture", ARCHITECTURE)) != (SYSTEM, ARCHITECTURE):
        raise NotFound(f"the image is for {config.get('os')}/{config.get('architecture')}, not {SYSTEM}/{ARCHITECTURE}")
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    out = {key: inner[key] for key in _CONFIG_KEYS if inner.get(key)}
    return out | {"WorkingDir": inner.get("WorkingDir") or "/"}


def _load(folder: Path, row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    path = _blob(folder, row)
    return _read_json(path), str(row["digest"])


def _blob(folder: Path, row: Any) -> Path:
    """Return the file of a descriptor, its size and its hash checked."""
    match = _DIGEST.fullmatch(str(row.get("digest"))) if isinstance(row, dict) else None
    size = row.get("size") if isinstance(row, dict) else None
    if match is None or not isinstance(size, int):
        raise Corrupt("the image names a blob by no sha256 digest, or without its size")
    path = folder / "blobs" / "sha256" / match[1]
    try:
        if not path.is_file() or path.stat().st_size != size:
            raise Corrupt(f"blob {match[1][:12]} of the image is missing or has another size")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != match[1]:
                raise Corrupt(f"blob {match[1][:12]} of the image is not what its digest says")
    except OSError as exc:
        raise Corrupt(f"blob {match[1][:12]} of the image cannot be read: {exc.strerror}") from exc
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise Corrupt(f"{path.name} is larger than {format_bytes(_JSON_BYTES_MAX)}")
        data = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError, RecursionError, ValueError) as exc:
        raise Corrupt(f"{path.name} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise Corrupt(f"{path.name} is no JSON object")
    return data


def make_root(image: OciImage, work: Path, progress: Progress, *, limit: int = ROOT_BYTES_MAX) -> Path:
    """Write the image's layers as one root image below `work` and return its path. Raises Corrupt, OutOfSpace."""
    archive, target, layers = work / "layers.tar", work / "root.erofs", Tree()
    with archive.open("w+b") as out:
        for number, path in enumerate(image.layers, 1):
            progress(f"unpacking layer {number} of {len(image.layers)}")
            with path.open("rb") as blob:
                begin = append_layer(blob, out, limit=limit)
            out.flush()
            layers.add(archive, begin)
    progress("writing the root image")
    erofs.write_image(with_folders(layers.nodes()), archive, target)
    archive.unlink()
    return target


def with_folders(nodes: dict[str, tree.Node]) -> dict[str, tree.Node]:
    """Return the tree with the folders that a machine needs to come up, whatever the image is made of."""
    out = dict(nodes)
    for name in _FOLDERS:
        out.setdefault(name, tree.Node(name, tree.FOLDER | (0o1777 if name == "tmp" else 0o755)))
    return tree.with_parents(out)
