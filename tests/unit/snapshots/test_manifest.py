"""Manifests: canonical, strict, and incompatible rather than misread."""

import json

import msgspec
import pytest
from blake3 import blake3

from recess.errors import BadInput, Corrupt, Incompatible
from recess.snapshots.manifest_v1 import FileV1, ManifestV1, PartV1, VmstateV1, decode_manifest, encode_manifest

H = "ab" * 32
GOOD = ManifestV1(
    created_ms=1, template="", parent=f"snp_{H}", fingerprint={"driver": "fake", "flags": ["a"]}, spec={"é": 1.5},
    origin={}, machine="mch_1", session="", log_position=3, epoch=1, why="idle", forkable=True,
    parts={"memory": PartV1(100, 1, 2, 3, H)}, vmstate=VmstateV1(f"vms_{H}", 10, 20),
    layers=[FileV1(f"lyr_{H}", 5, 4, 3)], pagemaps=[FileV1(f"pmp_{H}", 5, 4, 3)], sources=[H], made=[f"lyr_{H}"],
)  # fmt: skip


def canonical(fields):
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode(data):
    return decode_manifest("snp_" + blake3(data).hexdigest(), data)


def test_it_reads_back_and_is_canonical():
    snapshot_id, data = encode_manifest(GOOD)
    assert decode_manifest(snapshot_id, data) == GOOD
    assert data == canonical(msgspec.to_builtins(GOOD))
    assert snapshot_id == "snp_" + blake3(data).hexdigest()


def test_another_hash():
    _, data = encode_manifest(GOOD)
    with pytest.raises(Corrupt):
        decode_manifest(f"snp_{H}", data)


def changed(*path, value):
    fields = msgspec.to_builtins(GOOD)
    at = fields
    for step in path[:-1]:
        at = at[step]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return canonical(fields)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("epoch",), None), (("epoch",), -1), (("epoch",), "1"), (("epoch",), 1 << 60), (("new",), 1),
        (("forkable",), 1), (("template",), "other"), (("parent",), "snp_zz"), (("format",), "tar"),
        (("parts", "memory", "root"), "xx"), (("parts", "memory", "layer"), 101), (("parts", "memory", "pages"), 1 << 40),
        (("parts", "../x"), {"pages": 1, "zero": 0, "block": 0, "layer": 0, "root": H}),
        (("layers", 0, "id"), f"pmp_{H}"), (("layers", 0, "live"), 5), (("layers", 0, "bytes"), -1),
        (("layers",), [{"id": f"lyr_{H}", "bytes": 5, "entries": 4, "live": 3}] * 2),
        (("pagemaps", 0, "id"), "../../etc"), (("vmstate", "id"), f"lyr_{H}"), (("vmstate", "raw_bytes"), 1 << 40),
        (("sources",), [H, H]), (("sources",), ["x"]), (("made",), [f"lyr_{'cd' * 32}"]), (("fingerprint",), []),
    ],
)  # fmt: skip
def test_lies(path, value):
    with pytest.raises(Corrupt):
        decode(changed(*path, value=value))


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, [1]])
def test_an_unknown_version(version):
    with pytest.raises(Incompatible) as caught:
        decode(changed("version", value=version))
    assert caught.value.details["reasons"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"format":"recess.snapshot","version":1}', b"null", b"NaN"],
)
def test_what_is_no_manifest(data):
    with pytest.raises(Corrupt):
        decode(data)


def test_another_spelling_of_the_same_is_refused():
    _, data = encode_manifest(GOOD)
    with pytest.raises(Corrupt, match="canonical"):
        decode(data + b" ")
    with pytest.raises(Corrupt, match="canonical"):
        decode(json.dumps(json.loads(data), sort_keys=True).encode())


@pytest.mark.parametrize("spec", [{"x": object()}, {"x": float("nan")}, {"x": "y" * (5 << 20)}])
def test_what_is_no_json_is_not_written(spec):
    with pytest.raises(BadInput):
        encode_manifest(msgspec.structs.replace(GOOD, spec=spec))
