"""A root image read back: as the archive it could have been made from, and as an OCI layout."""

from __future__ import annotations

import io
import stat
import tarfile

import pytest

from recess.errors import Corrupt
from recess.images import erofs
from recess.images.layers import Tree, append_layer
from recess.images.oci import make_root, read_layout
from recess.images.tree import Node, read_tar, with_parents
from recess.images.unpack import write_layout, write_tar

NODES = [
    Node("bin", stat.S_IFDIR | 0o755),
    Node("bin/su", stat.S_IFREG | 0o4755, uid=0, gid=42, mtime_s=77, size=9000, data=bytes(range(250)) * 36),
    Node("bin/again", stat.S_IFREG, hardlink_to="bin/su"),
    Node("bin/empty", stat.S_IFREG | 0o600, uid=1000, gid=1001),
    Node("bin/ünï\udcff", stat.S_IFREG | 0o644, size=1, data=b"x"),
    Node("link", stat.S_IFLNK | 0o777, size=6, data=b"bin/su"),
    Node("dev", stat.S_IFDIR | 0o1777),
    Node("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
    Node("dev/far", stat.S_IFBLK | 0o660, device=(259, 1048000)),
    Node("pipe", stat.S_IFIFO | 0o600),
    Node(
        "cap", stat.S_IFREG | 0o755, size=2, data=b"ab", xattrs={"security.capability": b"\x01\0\0\2", "user.a": b"bc"}
    ),
]


def made(tmp_path, nodes, name="image"):
    source, target = tmp_path / "archive", tmp_path / name
    source.write_bytes(b"")
    erofs.write_image(with_parents({node.path: node for node in nodes}), source, target)
    return target


@pytest.fixture
def image(tmp_path):
    many = [Node(f"many/{n:04}{'y' * 60}", stat.S_IFREG | 0o644, size=3, data=b"abc") for n in range(300)]
    return made(tmp_path, [*NODES, *many])


def tar_of(image) -> bytes:
    out = io.BytesIO()
    write_tar(image, out)
    return out.getvalue()


def test_the_image_of_the_archive_of_an_image_is_the_same(tmp_path, image):
    archive = tmp_path / "out.tar"
    archive.write_bytes(tar_of(image))
    assert archive.read_bytes() == tar_of(image)
    erofs.write_image(read_tar(archive), archive, tmp_path / "again")
    assert tar_of(tmp_path / "again") == tar_of(image)


def test_an_archive_says_what_others_expect(image):
    with tarfile.open(fileobj=io.BytesIO(tar_of(image))) as tar:
        found = {member.name: member for member in tar}
        assert "" not in found
        assert (found["bin/su"].mode, found["bin/su"].gid, found["bin/su"].mtime) == (0o4755, 42, 77) or found[
            "bin/su"
        ].islnk()
        assert {found[name].islnk() for name in ("bin/su", "bin/again")} == {True, False}
        assert (found["dev/far"].devmajor, found["dev/far"].devminor) == (259, 1048000)
        assert found["link"].linkname == "bin/su"
        assert len([name for name in found if name.startswith("many/")]) == 300


def test_a_layout_is_read_as_any_other_and_gives_the_same_root(tmp_path, image):
    config = {"Cmd": ["sh"], "WorkingDir": "/bin"}
    ident = write_layout(image, config, tmp_path / "layout", "name")
    found = read_layout(tmp_path / "layout", "name")
    assert dict(found.config) == config
    assert len(ident) == 64
    work = tmp_path / "work"
    work.mkdir()
    root = make_root(found, work, lambda _line: None)
    layers = Tree()
    with (tmp_path / "flat").open("w+b") as out, found.layers[0].open("rb") as blob:
        layers.add(tmp_path / "flat", append_layer(blob, out))
    assert {"bin/su", "dev/null"} - set(layers.nodes()) == {"dev/null"}  # devices of an image are nobody's
    with tarfile.open(fileobj=io.BytesIO(tar_of(root))) as tar:
        assert {"bin/su", "link", "cap"} <= {member.name for member in tar}


def test_a_damaged_image_is_corrupt_or_read_and_never_a_crash(tmp_path):
    whole = made(tmp_path, NODES).read_bytes()
    broken = tmp_path / "broken"
    for cut in (4096, 5000, len(whole) - 4096):
        broken.write_bytes(whole[:cut])
        with pytest.raises(Corrupt):
            tar_of(broken)
    seed = 1
    for _ in range(300):
        seed = seed * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        changed = bytearray(whole)
        changed[1024 + (seed >> 33) % min(len(whole) - 1024, 12_000)] = seed >> 24 & 0xFF
        broken.write_bytes(changed)
        try:
            tar_of(broken)
        except Corrupt:
            continue


def test_what_is_no_image_is_told(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(8192))
    with pytest.raises(Corrupt, match="not a root image"):
        tar_of(other)
