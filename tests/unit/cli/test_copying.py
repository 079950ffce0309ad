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
    assert pack(source, "x", io.BytesIO()) == ["x/pipe"]
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
    with pytest.raises(BadInput, match="no folder"):
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
