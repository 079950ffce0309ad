"""Layers on top of each other: whiteouts, links, compressions; and what hostile archives get."""

import gzip
import io
import stat
import sys
import tarfile

import pytest

from recess.errors import Corrupt
from recess.images import layers
from recess.images.layers import Tree, append_layer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def tar(*members):
    """Members: (name, content), or (name, kind, link or device)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 1:
                info.size = len(rest[0])
                archive.addfile(info, io.BytesIO(rest[0]))
                continue
            info.type = rest[0]
            if rest[0] in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = rest[1]
            info.mode = 0o755
            if isinstance(rest[1], dict):
                info.pax_headers = rest[1]
            archive.addfile(info)
    return out.getvalue()


def folder(name):
    return (name, tarfile.DIRTYPE, None)


def link(name, target):
    return (name, tarfile.SYMTYPE, target)


def pile(tmp_path, *blobs, limit=layers.ROOT_BYTES_MAX):
    """Put layers on top of each other; returns {path: content, link target, or None for a folder}."""
    path, tree = tmp_path / "layers.tar", Tree()
    with path.open("w+b") as out:
        for blob in blobs:
            begin = append_layer(io.BytesIO(blob), out, limit=limit)
            out.flush()
            tree.add(path, begin)
    data = path.read_bytes()
    nodes = tree.nodes()

    def content(node):
        if node.hardlink_to:
            return ("link", node.hardlink_to)
        if stat.S_ISREG(node.mode):
            return data[node.offset : node.offset + node.size]
        return node.data.decode() if node.data is not None else None

    return {name: content(node) for name, node in nodes.items() if name}


def test_upper_layers_win_and_whiteouts_take_away(tmp_path):
    lower = tar(("etc/a", b"1"), ("etc/b", b"2"), ("opt/x/deep", b"3"), ("opt/y", b"4"), ("gone/f", b"5"))
    upper = tar(("etc/a", b"new"), ("etc/.wh.b", b""), ("opt/.wh..wh..opq", b""), ("opt/z", b"6"), (".wh.gone", b""))
    assert pile(tmp_path, lower, upper) == {"etc": None, "etc/a": b"new", "opt": None, "opt/z": b"6"}


def test_a_whiteout_does_not_touch_its_own_layer(tmp_path):
    lower, upper = (
        tar(("d/a", b"1")),
        tar(("d/b", b"2"), ("d/.wh..wh..opq", b""), ("d/.wh.b", b""), (".wh.nothing", b"")),
    )
    assert pile(tmp_path, lower, upper) == {"d": None, "d/b": b"2"}


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        zstd.compress,
        lambda data: data,
        lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
        lambda data: zstd.compress(data[:1000]) + zstd.compress(data[1000:]),
    ],
    ids=["gzip", "zstd", "plain", "members", "frames"],
)
def test_compressions(tmp_path, pack):
    assert pile(tmp_path, pack(tar(("f", b"x" * 5000)))) == {"f": b"x" * 5000}


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
def test_a_layer_that_breaks_off_is_damaged(tmp_path, pack):
    packed = pack(tar(("f", bytes(range(256)) * 999)))
    with pytest.raises(Corrupt):
        pile(tmp_path, packed[: len(packed) // 2])
    with pytest.raises(Corrupt):
        pile(tmp_path, packed[:10] + b"\xff" * (len(packed) - 10))


def test_links_are_followed_inside_the_tree_only(tmp_path):
    lower = tar(
        folder("usr"), folder("usr/lib"), link("lib", "usr/lib"), link("up", "../../../etc"), link("abs", "/usr")
    )
    upper = tar(("lib/so", b"1"), ("up/passwd", b"2"), ("abs/x", b"3"))
    found = pile(tmp_path, lower, upper)
    assert (found["usr/lib/so"], found["etc/passwd"], found["usr/x"]) == (b"1", b"2", b"3")
    assert (found["lib"], found["up"]) == ("usr/lib", "../../../etc")


def test_hard_links_survive_the_removal_of_the_first_name(tmp_path):
    lower = tar(("a", b"same"), ("b", tarfile.LNKTYPE, "a"), ("c", tarfile.LNKTYPE, "/a"))
    assert pile(tmp_path, lower) == {"a": b"same", "b": ("link", "a"), "c": ("link", "a")}
    assert pile(tmp_path, lower, tar((".wh.a", b""))) == {"b": b"same", "c": ("link", "b")}
    assert pile(tmp_path, lower, tar(("b", b"own"))) == {"a": b"same", "b": b"own", "c": ("link", "a")}


def test_folders_stay_and_files_give_way(tmp_path):
    assert pile(tmp_path, tar(("d/f", b"1")), tar(folder("d"))) == {"d": None, "d/f": b"1"}
    assert pile(tmp_path, tar(("d/f", b"1")), tar(("d", b"file"))) == {"d": b"file"}
    assert pile(tmp_path, tar(("d", b"file")), tar(folder("d"), ("d/f", b"1"))) == {"d": None, "d/f": b"1"}


@pytest.mark.parametrize(
    "blob",
    [
        tar(("../out", b"x")),
        tar(("a/../../out", b"x")),
        tar(("disk", tarfile.BLKTYPE, None)),
        tar(("etc/mem", tarfile.CHRTYPE, None)),
        tar(("h", tarfile.LNKTYPE, "../../etc/shadow")),
        tar(("h", tarfile.LNKTYPE, "nowhere")),
        tar(folder("d"), ("h", tarfile.LNKTYPE, "d")),
        tar(link("a", "b"), link("b", "a"), ("a/x", b"1")),
        tar(("f", b"1"), ("f/x", b"2")),
        b"\0" * 100 + b"no tar" * 100,
        tar(("f", b"x" * 4000))[:2000],
    ],
)
def test_hostile_and_damaged_archives_are_refused(tmp_path, blob):
    with pytest.raises(Corrupt):
        pile(tmp_path, blob)


def test_what_is_harmless_is_dropped(tmp_path):
    blob = tar(
        ("dev/null", tarfile.CHRTYPE, None), ("x", tarfile.DIRTYPE, {"SCHILY.xattr.trusted.overlay.opaque": "y"})
    )
    path, tree = tmp_path / "layers.tar", Tree()
    with path.open("w+b") as out:
        begin = append_layer(io.BytesIO(blob), out)
    tree.add(path, begin)
    assert "dev/null" not in tree.nodes()
    assert tree.nodes()["x"].xattrs == {}


def test_bombs_are_bounded(tmp_path, monkeypatch):
    bomb = gzip.compress(tar(("zeros", bytes(8 << 20))))
    assert len(bomb) < 10_000
    with pytest.raises(Corrupt, match="more than"):
        pile(tmp_path, bomb, limit=1 << 20)
    assert (tmp_path / "layers.tar").stat().st_size <= 1 << 20
    monkeypatch.setattr(layers, "ENTRIES_MAX", 50)
    with pytest.raises(Corrupt, match="entries"):
        pile(tmp_path, tar(*((f"f{n}", b"") for n in range(60))))


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    with pytest.raises(Corrupt, match="header"):
        pile(tmp_path, tar(("x", tarfile.DIRTYPE, {"comment": "y" * (2 << 20)})))
