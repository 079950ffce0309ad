"""OCI layouts: the right manifest, digests that hold, what an image says about its start; references and failures."""

import json

import pytest

from recess.errors import BadInput, Corrupt, NotFound, Refused, Unavailable
from recess.images.oci import make_root, read_layout
from recess.images.registry import archive_kind, copy_command, explain, with_tag
from recess.testing.oci_image import ImageMaker
from tests.unit.images.test_layers import tar


@pytest.fixture
def maker(tmp_path):
    return ImageMaker(tmp_path / "layout")


def test_an_image_for_this_machine_is_found_in_a_nested_index(maker, tmp_path):
    arm = maker.manifest([tar(("arm", b""))], {}, architecture="arm64")
    ours = maker.manifest(
        [tar(("ours", b"1")), tar(("more", b"2"))], {"Cmd": ["/ours"], "Env": ["A=1"]}, packing="zstd"
    )
    maker.finish([maker.index([arm, ours])])
    image = read_layout(maker.folder)
    assert image.digest == ours["digest"]
    assert dict(image.config) == {"Cmd": ["/ours"], "Env": ["A=1"], "WorkingDir": "/"}
    root = make_root(image, tmp_path, lambda _line: None)
    assert root.stat().st_size % 4096 == 0
    assert b"ours" in root.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["root.erofs"]


def test_by_name(maker):
    rows = [maker.manifest([tar((name, b""))], {"Cmd": [name]}, name=name) for name in ("one", "two")]
    maker.finish(rows)
    assert read_layout(maker.folder, "two").config["Cmd"] == ["two"]
    assert read_layout(maker.folder).config["Cmd"] == ["one"]


def test_nothing_for_this_machine(maker):
    maker.finish([maker.manifest([], {}, architecture="arm64")])
    with pytest.raises(NotFound, match="amd64"):
        read_layout(maker.folder)


def test_what_lies_is_refused(maker, tmp_path):
    row = maker.manifest([tar(("f", b"1"))], {})
    maker.finish([row])
    blob = maker.folder / "blobs" / "sha256" / row["digest"].partition(":")[2]
    layer = json.loads(blob.read_bytes())["layers"][0]["digest"].partition(":")[2]
    path = maker.folder / "blobs" / "sha256" / layer
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Corrupt, match="digest"):
        read_layout(maker.folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(Corrupt, match="size"):
        read_layout(maker.folder)
    path.unlink()
    with pytest.raises(Corrupt, match="missing"):
        read_layout(maker.folder)
    with pytest.raises(BadInput, match="no OCI image layout"):
        read_layout(tmp_path)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "md5:0", "sha256:" + "0" * 63, None])
def test_a_digest_is_never_a_path(maker, digest):
    maker.finish([{"mediaType": "x", "digest": digest, "size": 1}])
    with pytest.raises(Corrupt):
        read_layout(maker.folder)


def test_a_manifest_that_is_too_large_is_not_read(maker):
    maker.finish([])
    (maker.folder / "index.json").write_bytes(b" " * (9 << 20))
    with pytest.raises(Corrupt, match="larger"):
        read_layout(maker.folder)


def test_too_many_layers(maker):
    maker.finish([maker.manifest([tar(("f", b""))] * 513, {})])
    with pytest.raises(BadInput, match="513 layers"):
        read_layout(maker.folder)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("debian", "debian:latest"),
        ("python:3.12", "python:3.12"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ("ghcr.io/o/n@sha256:" + "0" * 64, "ghcr.io/o/n@sha256:" + "0" * 64),
    ],
)
def test_references(said, meant):
    assert with_tag(said) == meant


@pytest.mark.parametrize("said", ["", "UPPER", "a b", "--option", "x:", "a@sha256:1", "x" * 300, "../x"])
def test_bad_references(said):
    with pytest.raises(BadInput):
        with_tag(said)


def test_the_command_never_takes_a_name_for_an_option(tmp_path):
    command = copy_command("docker://debian:12", tmp_path, insecure=True)
    assert command[-2:] == ["docker://debian:12", f"oci:{tmp_path}:layout"]
    assert "--src-tls-verify=false" in command


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("reading manifest 1 in x: manifest unknown: manifest unknown", NotFound),
        ("requested access to the resource is denied", Refused),
        ("unauthorized: authentication required", Refused),
        ("pinging container registry: dial tcp 127.0.0.1:9: connect: connection refused", Unavailable),
        ("no image found in manifest list for architecture amd64", NotFound),
    ],
)
def test_failures_say_what_to_do(log, error):
    found = explain(Unavailable("skopeo failed", log=log), "x:1")
    assert type(found) is error


def test_kinds_of_archives(tmp_path):
    for kind, blob in (
        ("docker-archive", tar(("blob", b"x"), ("manifest.json", b"[]"))),
        ("oci-archive", tar(("./oci-layout", b"{}"), ("index.json", b"{}"))),
        ("root", tar(("etc/passwd", b""))),
        ("root", b"not a tar"),
    ):
        path = tmp_path / "a.tar"
        path.write_bytes(blob)
        assert archive_kind(path) == kind
