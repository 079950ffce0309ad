"""Ids of stored things and the blob keys they live under. A hash is BLAKE3-256, an id is a prefix and 64 hex digits.

    manifests/snp_<hash of the manifest's bytes>
    layers/lyr_<hash of its index>       recoded/lyr_<the same> (recompressed: the same content under the same id)
    pagemaps/pmp_<hash of its index>       vmstates/vms_<hash of its index>

All but the first are files of `recess.frames`: the hash of the index covers every byte of content.
"""

from __future__ import annotations

import re

from recess.errors import BadInput

SNAPSHOT = "snp"
LAYER = "lyr"
PAGEMAP = "pmp"
VMSTATE = "vms"

_FOLDERS = {SNAPSHOT: "manifests", LAYER: "layers", PAGEMAP: "pagemaps", VMSTATE: "vmstates"}
LAYER_FOLDER = _FOLDERS[LAYER]
RECODED_FOLDER = "recoded"
FOLDERS = (*(f"{folder}/" for folder in _FOLDERS.values()), f"{RECODED_FOLDER}/")
_ID = re.compile(r"(snp|lyr|pmp|vms)_([0-9a-f]{64})")


FILE_KEY = re.compile(r"files/src_([0-9a-f]{64})")
"""The key of an image file (a root, a kernel) that travels with a snapshot; the hash is that of its content, unpacked.
No snapshot refers to it by this key, and no sweep touches it."""


def file_key(digest_hex: str) -> str:
    """Return the key of a packed image file."""
    return f"files/src_{digest_hex}"


def make_id(prefix: str, digest_hex: str) -> str:
    """Return the id of a thing of this kind with this hash."""
    return f"{prefix}_{digest_hex}"


def is_id(value: str, prefix: str) -> bool:
    """Tell whether `value` is a whole id of this kind."""
    match = _ID.fullmatch(value)
    return match is not None and match[1] == prefix


def digest_of(ref: str) -> str:
    """Return the hex hash of an id. Raises BadInput."""
    match = _ID.fullmatch(ref)
    if match is None:
        raise BadInput(f"not the id of a stored thing: {ref[:80]!r}")
    return match[2]


def key_of(ref: str) -> str:
    """Return the blob key of an id. Raises BadInput if it is none."""
    digest_of(ref)
    return f"{_FOLDERS[ref[:3]]}/{ref}"


def recoded_key_of(layer_id: str) -> str:
    """Return the key under which a layer is stored once it was recompressed. Raises BadInput if it is no layer's id."""
    if not is_id(layer_id, LAYER):
        raise BadInput(f"not the id of a layer: {layer_id[:80]!r}")
    return f"{RECODED_FOLDER}/{layer_id}"


def keys_of(ref: str) -> tuple[str, ...]:
    """Return every key a thing may be stored under, the usual one first. Raises BadInput if it is no id."""
    return (key_of(ref), recoded_key_of(ref)) if is_id(ref, LAYER) else (key_of(ref),)


def is_layer_key(key: str) -> bool:
    """Tell whether a blob key is a layer's, in either form."""
    return is_id(key.rpartition("/")[2], LAYER)


def id_of(key: str) -> str | None:
    """Return the id stored under a blob key, None if the key is not one of ours."""
    folder, _, name = key.rpartition("/")
    match = _ID.fullmatch(name)
    if match is None:
        return None
    return name if folder == _FOLDERS[match[1]] or (folder == RECODED_FOLDER and match[1] == LAYER) else None
