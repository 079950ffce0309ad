"""The host's side of a volume: bounds, and that nothing is written through a link or over what somebody else changed."""

import io
import os

import pytest

from recess.errors import BadInput, Conflict, NotFound, Unavailable
from recess.volumes import DIR, FILE, LINK, Entry, History, HostSide, NamedVolumes, Pair, Seen
from recess.volumes.hostside import PART, Changed

MUCH = 1 << 30
NEW = Entry(FILE, 3, 10**18, 0o644)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "v"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "f").write_text("old")
    (root / "link").symlink_to("sub/f")
    (root / "out").symlink_to(tmp_path)
    return root


def test_a_scan_sees_files_folders_and_links_and_follows_none(folder):
    os.mkfifo(folder / "pipe")
    (folder / (PART + "1")).write_text("of a crash")
    with HostSide(folder) as side:
        found = side.scan(MUCH, tidy=True)
    assert {path: entry.kind for path, entry in found.tree.items()} == {
        "sub": DIR, "sub/f": FILE, "link": LINK, "out": LINK,
    }  # fmt: skip
    assert list(found.left_out) == ["pipe"]
    assert not (folder / (PART + "1")).exists()


def test_a_scan_is_bounded(folder, monkeypatch):
    monkeypatch.setattr("recess.volumes.hostside.ENTRIES_MAX", 3)
    with HostSide(folder) as side:
        with pytest.raises(BadInput, match="more than 3 files"):
            side.scan(MUCH, tidy=False)
        monkeypatch.undo()
        with pytest.raises(BadInput, match="more than 2 B"):
            side.scan(2, tidy=False)


def test_a_folder_that_cannot_be_read_is_an_error_and_not_empty(folder, monkeypatch):
    def refuse(*_args, onerror, **_more):
        onerror(PermissionError(13, "Permission denied", "sub"))
        return iter(())

    monkeypatch.setattr("recess.volumes.hostside.os.fwalk", refuse)
    with HostSide(folder) as side, pytest.raises(Unavailable, match="Permission denied"):
        side.scan(MUCH, tidy=False)


def test_writing_keeps_the_hosts_permissions_and_takes_the_time(folder):
    (folder / "sub" / "f").chmod(0o600)
    with HostSide(folder) as side:
        seen = side.scan(MUCH, tidy=False).tree["sub/f"]
        now = side.put_file("sub/f", io.BytesIO(b"new"), Entry(FILE, 3, 10**18, 0o4777), seen)
        assert side.scan(MUCH, tidy=False).tree["sub/f"] == now
    info = (folder / "sub" / "f").stat()
    assert (info.st_mtime_ns, info.st_mode & 0o7777) == (10**18, 0o700)
    assert (folder / "sub" / "f").read_text() == "new"


def test_nothing_is_written_through_a_link(folder, tmp_path):
    with HostSide(folder) as side:
        for path in ("out/x", "link/x"):
            with pytest.raises(Changed):
                side.put_file(path, io.BytesIO(b"x"), NEW, None)
        with pytest.raises(Changed):
            side.put_folder("out/d", None)
        with pytest.raises(Changed, match="leads out"):
            side.put_link("evil", "/etc/passwd", None)
        for path in ("../x", "a/../x", "", "a//b"):
            with pytest.raises(Changed):
                side.put_file(path, io.BytesIO(b"x"), NEW, None)
        side.put_file("out", io.BytesIO(b"a file now"), NEW, side.scan(MUCH, tidy=False).tree["out"])
    assert (folder / "out").read_text() == "a file now"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v"]


def test_what_was_changed_meanwhile_is_left_alone(folder):
    with HostSide(folder) as side:
        seen = side.scan(MUCH, tidy=False).tree["sub/f"]
        (folder / "sub" / "f").write_text("changed by somebody")
        for act in (
            lambda: side.put_file("sub/f", io.BytesIO(b"new"), NEW, seen),
            lambda: side.remove("sub/f", seen),
            lambda: side.put_aside("sub/f", seen, "host"),
            lambda: side.put_file("sub/f", io.BytesIO(b"new"), NEW, None),
        ):
            with pytest.raises(Changed):
                act()
    assert (folder / "sub" / "f").read_text() == "changed by somebody"
    assert [p.name for p in (folder / "sub").iterdir()] == ["f"]


def test_a_loser_gets_a_name_that_is_free(folder):
    with HostSide(folder) as side:
        seen = side.scan(MUCH, tidy=False).tree["sub/f"]
        assert side.put_beside("sub/f", io.BytesIO(b"one"), NEW, "m", like=seen) == "sub/f.conflict-m"
        assert side.put_beside("sub/f", io.BytesIO(b"two"), NEW, "m", like=seen) == "sub/f.conflict-m-2"
        assert side.put_aside("sub/f", seen, "host") == "sub/f.conflict-host"
    assert sorted((p.name, p.read_text()) for p in (folder / "sub").iterdir()) == [
        ("f.conflict-host", "old"), ("f.conflict-m", "one"), ("f.conflict-m-2", "two"),
    ]  # fmt: skip


def test_one_file_is_a_volume_too(tmp_path):
    file = tmp_path / "conf"
    file.write_text("a=1")
    (tmp_path / "other").write_text("not part of it")
    with HostSide(file) as side:
        found = side.scan(MUCH, tidy=True)
        assert list(found.tree) == [""]
        assert b"".join(side.read("", found.tree[""])) == b"a=1"
        side.put_file("", io.BytesIO(b"a=2"), NEW, found.tree[""])
        with pytest.raises(Changed):
            side.put_file("x/y", io.BytesIO(b"a=2"), NEW, None)
    assert (file.read_text(), (tmp_path / "other").read_text()) == ("a=2", "not part of it")
    with pytest.raises(NotFound):
        HostSide(tmp_path / "nothing")


def test_a_file_that_shrinks_while_it_is_read_keeps_its_length(folder):
    with HostSide(folder) as side:
        assert b"".join(side.read("sub/f", Entry(FILE, 5))) == b"old\0\0"


def test_the_history_keeps_its_newest_and_believes_no_name(tmp_path):
    history = History(tmp_path / "h")
    marks = [f"{n:032x}" for n in range(12)]
    for n, mark in enumerate(marks):
        history.save(Seen(mark, True, {"/data": {"f": Pair(NEW, None)}}))
        os.utime(tmp_path / "h" / f"{mark}.json", ns=(n, n))
    assert history.load(marks[-1]).mounts["/data"]["f"] == Pair(NEW, None)
    assert history.load(marks[0]) is None
    (tmp_path / "x.json").write_text("{}")
    assert [history.load(m) for m in ("../x", "", "0" * 31, "g" * 32)] == [None] * 4
    (tmp_path / "h" / f"{marks[-1]}.json").write_text("{")
    assert history.load(marks[-1]) is None


def test_named_volumes(tmp_path):
    volumes = NamedVolumes(tmp_path / "vols")
    assert volumes.list_all() == []
    with pytest.raises(NotFound):
        volumes.get("data")
    for bad in ("", "../x", "a/b", ".gone-x", "x" * 65):
        with pytest.raises(BadInput):
            volumes.create(bad)
    volumes.create("data")
    (tmp_path / "vols" / "data" / "f").write_text("x")
    assert volumes.create("data").files == 1
    with pytest.raises(Conflict, match="dev"):
        volumes.remove("data", users=["dev"])
    volumes.remove("data", users=[])
    assert volumes.list_all() == []
