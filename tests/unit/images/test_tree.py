import io
import stat
import tarfile

import pytest

from recess.errors import Corrupt
from recess.images import tree
from recess.images.tree import Node


def tar(path, *members: tuple[tarfile.TarInfo, bytes]):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def test_a_tar_archive_is_read(tmp_path):
    path = tar(
        tmp_path / "t.tar",
        (member("./usr/", tarfile.DIRTYPE, mode=0o755), b""),
        (member("./usr/sudo", mode=0o4755, uid=0, gid=7, mtime=5), b"program"),
        (member("./dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("./a", tarfile.SYMTYPE, linkname="usr/sudo"), b""),
        (member("./b", tarfile.LNKTYPE, linkname="./usr/sudo"), b""),
        (member("./c", pax_headers={"SCHILY.xattr.security.capability": "\x01"}), b"x"),
    )
    nodes = tree.read_tar(path)
    sudo = nodes["usr/sudo"]
    assert (sudo.mode, sudo.gid, sudo.mtime_s, sudo.size) == (stat.S_IFREG | 0o4755, 7, 5, 7)
    assert path.read_bytes()[sudo.offset : sudo.offset + sudo.size] == b"program"
    assert nodes["dev/null"].device == (1, 3)
    assert nodes["a"].data == b"usr/sudo"
    assert nodes["b"].hardlink_to == "usr/sudo"
    assert nodes["c"].xattrs == {"security.capability": b"\x01"}
    assert stat.S_ISDIR(nodes["dev"].mode)
    assert stat.S_ISDIR(nodes[""].mode)


def test_a_path_that_leaves_the_tree_is_refused(tmp_path):
    with pytest.raises(Corrupt, match="outside"):
        tree.read_tar(tar(tmp_path / "t.tar", (member("a/../../etc/passwd"), b"x")))


def test_a_damaged_archive_is_corrupt(tmp_path):
    path = tar(tmp_path / "t.tar", (member("a"), b"x" * 2000))
    path.write_bytes(b"garbage" + path.read_bytes()[7:])
    with pytest.raises(Corrupt):
        tree.read_tar(path)


def test_too_many_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "_MAX_ENTRIES", 3)
    with pytest.raises(Corrupt, match="more than 3"):
        tree.read_tar(tar(tmp_path / "t.tar", *((member(f"f{i}"), b"") for i in range(4))))


def file(path: str, **fields) -> Node:
    return Node(path, stat.S_IFREG | 0o644, **fields)


def test_pruning_keeps_the_exceptions_and_their_folders():
    nodes = {p: file(p) for p in ("doc/a/readme", "doc/a/copyright", "bin/x")}
    kept = tree.prune(nodes, ["doc/*"], ["doc/*/copyright"])
    assert set(kept) == {"", "doc", "doc/a", "doc/a/copyright", "bin", "bin/x"}


def test_a_hard_link_inherits_a_pruned_file():
    nodes = {
        "doc/x": file("doc/x", size=3, offset=9),
        "a": Node("a", 0, hardlink_to="doc/x"),
        "b": Node("b", 0, hardlink_to="doc/x"),
    }
    kept = tree.prune(nodes, ["doc/*"])
    assert (kept["a"].offset, kept["a"].size, kept["a"].hardlink_to) == (9, 3, "")
    assert kept["b"].hardlink_to == "a"


def test_times_of_the_build_become_the_newest_package_time():
    nodes = {"old": file("old", mtime_s=10), "newer": file("newer", mtime_s=20), "now": file("now", mtime_s=1000)}
    settled = tree.settle_times(nodes, 900)
    assert {p: n.mtime_s for p, n in settled.items()} == {"old": 10, "newer": 20, "now": 20}


def test_a_small_file_replaces_what_was_there():
    nodes = tree.with_parents({"etc/hostname": file("etc/hostname", size=9, offset=512)})
    tree.put_file(nodes, "etc/hostname", b"new\n")
    assert nodes["etc/hostname"].data == b"new\n"
