"""Version 1 of the manifest: canonical JSON, named by its BLAKE3-256. Written last: it is the commit of a snapshot.

Canonical: keys sorted, no white space, UTF-8 unescaped, no NaN. Fields: docs/internals/snapshot-format.md. Reading is
strict: an unknown version is `Incompatible`; an unknown or missing field, a number over its cap, or a claim that
contradicts another is `Corrupt`, hash or no hash: a manifest may come from somebody else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from blake3 import blake3

from recess.errors import BadInput, Corrupt, Incompatible
from recess.snapshots.keys import LAYER, PAGEMAP, SNAPSHOT, VMSTATE, is_id, make_id
from recess.snapshots.pagemap import PAGES_MAX

FORMAT = "recess.snapshot"
VERSION = 1
MANIFEST_BYTES_MAX = 1 << 22
PARTS_MAX = 64
FILES_MAX = 1024
VMSTATE_RAW_MAX = 1 << 28

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Pages = Annotated[int, msgspec.Meta(ge=0, le=PAGES_MAX)]
_Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_-]{0,63}$")]
_Json = dict[str, Any]


class FileV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer or a page-map pack in use. `entries`: its slots or nodes; `live`: how many of them this snapshot uses."""

    id: str
    bytes: _Count
    entries: _Count
    live: _Count


class PartV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part. `pages`: its size; zero, block, layer: how many pages the map lists, by source. `root`: of its map."""

    pages: _Pages
    zero: _Pages
    block: _Pages
    layer: _Pages
    root: _Hex

    @property
    def listed(self) -> int:
        """How many pages the map lists."""
        return self.zero + self.block + self.layer


class VmstateV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device state's file."""

    id: str
    bytes: _Count
    raw_bytes: Annotated[int, msgspec.Meta(ge=0, le=VMSTATE_RAW_MAX)]


class ManifestV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a snapshot is. `made`: the files that were new with it; `sources`: hashes of block files in use."""

    format: str = FORMAT
    version: int = VERSION
    created_ms: _Count
    template: str
    parent: str
    fingerprint: _Json
    spec: _Json
    origin: _Json
    machine: str
    session: str
    log_position: _Count
    epoch: _Count
    why: str
    forkable: bool
    parts: dict[_Name, PartV1]
    vmstate: VmstateV1
    layers: list[FileV1]
    pagemaps: list[FileV1]
    sources: list[_Hex]
    made: list[str]

    def files(self) -> list[str]:
        """Return the ids of all files this snapshot needs, its template's not counted."""
        return [*(f.id for f in self.layers), *(f.id for f in self.pagemaps), self.vmstate.id]


def encode_manifest(manifest: ManifestV1) -> tuple[str, bytes]:
    """Return id and bytes. Raises BadInput if what the caller put in is no JSON data or too large."""
    try:
        data = _canonical(msgspec.to_builtins(manifest))
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadInput(f"a manifest can hold only JSON data: {exc}") from exc
    if len(data) > MANIFEST_BYTES_MAX:
        raise BadInput(f"a manifest of {len(data)} bytes is over the cap of {MANIFEST_BYTES_MAX}")
    snapshot_id = make_id(SNAPSHOT, blake3(data).hexdigest())
    try:
        decode_manifest(snapshot_id, data)  # what could not be read back is not written
    except Corrupt as exc:
        raise BadInput(f"this cannot be a snapshot: {exc.message}") from exc
    return snapshot_id, data


def decode_manifest(snapshot_id: str, data: bytes) -> ManifestV1:
    """Return the checked manifest. Raises Corrupt, Incompatible."""
    if make_id(SNAPSHOT, blake3(data).hexdigest()) != snapshot_id:
        raise _corrupt(snapshot_id, "does not match its hash")
    try:
        fields = json.loads(data)
        canonical = _canonical(fields) == data
    except (ValueError, TypeError, RecursionError) as exc:
        raise _corrupt(snapshot_id, "is not JSON") from exc
    if not isinstance(fields, Mapping) or fields.get("format") != FORMAT:
        raise _corrupt(snapshot_id, "is not a snapshot's manifest")
    version = fields.get("version")
    if version != VERSION:
        reason = f"manifest version {version!r}"
        raise Incompatible(f"manifest {snapshot_id[:16]}: version {version!r} is unknown here", reasons=[reason])
    if not canonical:
        raise _corrupt(snapshot_id, "is not in canonical form")
    try:
        manifest = msgspec.convert(fields, ManifestV1)
    except msgspec.ValidationError as exc:
        raise _corrupt(snapshot_id, str(exc)) from exc
    _check_claims(snapshot_id, manifest)
    return manifest


def _check_claims(snapshot_id: str, m: ManifestV1) -> None:
    """Raise Corrupt for claims that no writer makes."""
    if not all(ref == "" or is_id(ref, SNAPSHOT) for ref in (m.template, m.parent)):
        raise _corrupt(snapshot_id, "names a template or parent that is no snapshot")
    if len(m.parts) > PARTS_MAX or len(m.layers) > FILES_MAX or len(m.pagemaps) > FILES_MAX:
        raise _corrupt(snapshot_id, "names too many parts or files")
    if any(part.listed > part.pages for part in m.parts.values()):
        raise _corrupt(snapshot_id, "lists more pages than a part has")
    for files, prefix in ((m.layers, LAYER), (m.pagemaps, PAGEMAP)):
        ids = [file.id for file in files]
        if ids != sorted(set(ids)) or not all(is_id(ref, prefix) for ref in ids):
            raise _corrupt(snapshot_id, "has a bad table of files")
        if any(file.live > file.entries for file in files):
            raise _corrupt(snapshot_id, "uses more of a file than there is")
    if m.sources != sorted(set(m.sources)):
        raise _corrupt(snapshot_id, "has a bad table of sources")
    if not is_id(m.vmstate.id, VMSTATE) or m.made != sorted(set(m.made)) or not set(m.made) <= set(m.files()):
        raise _corrupt(snapshot_id, "claims files that are not its own")


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _corrupt(snapshot_id: str, why: str) -> Corrupt:
    return Corrupt(f"manifest {snapshot_id[:16]} {why}", blob=snapshot_id)
