"""`cp`'s tars: what is packed comes back, and what a hostile machine sends stays inside."""

import io
import os
import tarfile

import pytest

from recess.cli.copying import pack, unpack
from recess.cli.verbs.cp import split
from recess.errors import BadInput


def packed(source, name, **options):
    out = io.BytesIO()
    pack(source, name, out, **options)
    out.seek(0)
    return out


def test_there_and_back(tmp_path):
    source = tmp_path / "tree"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "f").write_bytes(b"x" * 3000)
    (source / "deep" / "f").chmod(0o640)
    (source / "hard").hardlink_to(source / "deep" / "f")
    (source / "link").symlink_to("deep/f")
    (source / "abs").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    assert pack(source, "x", io.BytesIO()).left == ["x/pipe"]
    for name, where in (("new", tmp_path / "new"), ("", tmp_path / "into")):
        if not name:
            where.mkdir()
        unpack(packed(source, "x"), tmp_path if name else where, name)
        assert (where / "deep" / "f").read_bytes() == b"x" * 3000
        assert (where / "deep" / "f").stat().st_mode & 0o777 == 0o640
        assert (where / "hard").stat().st_nlink == 2
        assert (where / "link").read_bytes() == b"x" * 3000
        assert (where / "abs").readlink().as_posix() == "/etc/passwd"
        assert not (where / "pipe").exists()
        unpack(packed(source, "x"), tmp_path if name else where, name)  # over itself


def small(path):
    """Tell whether a file takes hardly any room."""
    return path.stat().st_blocks * 512 < 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A file of 64 MiB with data in two places, and its bytes there."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(64 << 20)
        for at in (1 << 20, 40 << 20):
            file.seek(at)
            file.write(b"data" * 5000)
        file.flush()
        os.fsync(file.fileno())
    if not small(path):
        pytest.fail("this file system keeps no holes")
    return path


@pytest.mark.parametrize("holes", [True, False])
def test_a_file_with_holes(tmp_path, disk, holes):
    out = io.BytesIO()
    packed = pack(disk, "x", out, holes=holes)
    assert packed.with_holes is holes
    assert (len(out.getvalue()) < 1 << 20) is holes
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:  # as everybody reads it
        assert tar.getmember("x").size == 64 << 20
    out.seek(0)
    unpack(out, tmp_path, "copy")
    assert (tmp_path / "copy").read_bytes() == disk.read_bytes()
    assert small(tmp_path / "copy") is holes


def test_a_file_that_is_one_hole_among_others(tmp_path):
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree" / "hole").open("wb") as file:
        file.truncate(8 << 20)
    (tmp_path / "tree" / "z").write_text("behind it")
    unpack(packed(tmp_path / "tree", "x"), tmp_path, "copy")
    assert (tmp_path / "copy" / "hole").stat().st_size == 8 << 20
    assert small(tmp_path / "copy" / "hole")
    assert (tmp_path / "copy" / "z").read_text() == "behind it"


@pytest.mark.parametrize(
    ("table", "data", "said"),
    [
        (b"1\n900\n200\n", b"x" * 200, "wrong map"),
        (b"2\n500\n10\n100\n10\n", b"x" * 20, "wrong map"),
        (b"1\n0\n600\n", b"", "no tar"),
        (b"9\n0\n1\n", b"", "no tar"),
        (b"nonsense", b"", "no tar"),
    ],
)
def test_maps_that_lie_are_refused(tmp_path, table, data, said):
    body = table.ljust(512, b"\0") + data
    info = tarfile.TarInfo("x")
    info.size = len(body)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000"}
    hostile = info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512)
    with pytest.raises(BadInput, match=said):
        unpack(io.BytesIO(hostile), tmp_path, "f")


def test_a_set_uid_bit_comes_along_if_that_is_asked_for(tmp_path):
    (tmp_path / "su").write_text("")
    (tmp_path / "su").chmod(0o4755)
    for rights, dropped, mode in ((False, 1, 0o755), (True, 0, 0o4755)):
        assert unpack(packed(tmp_path / "su", "x"), tmp_path, "copy", rights=rights) == dropped
        assert (tmp_path / "copy").stat().st_mode & 0o7777 == mode


def test_a_link_is_copied_or_followed(tmp_path):
    (tmp_path / "f").write_text("text")
    (tmp_path / "l").symlink_to("f")
    unpack(packed(tmp_path / "l", "x"), tmp_path, "as-link")
    unpack(packed(tmp_path / "l", "x", follow=True), tmp_path, "as-file")
    assert (tmp_path / "as-link").is_symlink()
    assert not (tmp_path / "as-file").is_symlink()


def archive(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    out.seek(0)
    return out


@pytest.mark.parametrize(
    "members",
    [
        [("../out", tarfile.REGTYPE, "")],
        [("/x/out", tarfile.REGTYPE, "")],
        [("x/../../out", tarfile.REGTYPE, "")],
        [("y", tarfile.REGTYPE, "")],
        [("x", tarfile.DIRTYPE, ""), ("x/h", tarfile.LNKTYPE, "../../secret")],
    ],
)
def test_paths_that_leave_are_refused(tmp_path, members):
    (tmp_path / "in").mkdir()
    with pytest.raises(BadInput, match="should not"):
        unpack(archive(*members), tmp_path / "in", "name")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_nothing_is_written_through_a_link_that_came_along(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside").mkdir()
    hostile = archive(
        ("x", tarfile.DIRTYPE, ""), ("x/d", tarfile.SYMTYPE, str(tmp_path / "outside")), ("x/d/f", tarfile.REGTYPE, "")
    )
    with pytest.raises(BadInput):
        unpack(hostile, tmp_path / "in", "name")
    assert os.listdir(tmp_path / "outside") == []


def test_a_file_that_is_a_link_here_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("old")
    (tmp_path / "f").symlink_to("victim")
    unpack(archive(("x", tarfile.REGTYPE, "")), tmp_path, "f")
    assert (tmp_path / "victim").read_text() == "old"
    assert not (tmp_path / "f").is_symlink()


def test_what_is_not_there_and_what_is_no_archive(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        packed(tmp_path / "none", "x")
    (tmp_path / "f").write_text("")
    with pytest.raises(BadInput, match="a file, no folder"):
        packed(tmp_path / "f", "")
    with pytest.raises(BadInput, match="no tar"):
        unpack(io.BytesIO(b"nonsense" * 100), tmp_path, "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dev:/a", ("dev", "/a")),
        ("./a:b", ("", "./a:b")),
        ("/a:b", ("", "/a:b")),
        ("a", ("", "a")),
        (":/a", ("", ":/a")),
    ],
)
def test_who_is_meant(text, expected):
    assert split(text) == expected
