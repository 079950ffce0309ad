import errno
import os
import subprocess
import sys

import pytest

from recess.errors import Corrupt, OutOfSpace
from recess.images import files


def test_a_build_folder_is_gone_however_the_block_ends(tmp_path):
    def build():
        with files.build_dir(tmp_path) as work:
            (work / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_dead_builds_folder_is_swept_and_a_living_ones_stays(tmp_path):
    dead = tmp_path / "tmp" / "dead"
    dead.mkdir(parents=True)
    (dead / "half").write_text("x")
    with files.build_dir(tmp_path) as living:
        assert not dead.exists()
        script = "import sys, pathlib; from recess.images import files\nwith files.build_dir(pathlib.Path(sys.argv[1])): pass"
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
        assert living.is_dir()


def test_publishing_a_folder_twice_keeps_the_first(tmp_path):
    for text in ("first", "second"):
        new = tmp_path / "new"
        new.mkdir()
        (new / "f").write_text(text)
        files.publish_dir(new, tmp_path / "store" / "address")
    assert (tmp_path / "store" / "address" / "f").read_text() == "first"
    assert not (tmp_path / "new").exists()


def test_json_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "names" / "a.json"
    files.write_json(path, {"version": 1, "n": 1})
    files.write_json(path, {"version": 1, "n": 2})
    assert files.read_json(path, 1)["n"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2}', b"\xff\xfe"])
def test_damaged_metadata_is_corrupt(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        files.read_json(path, 1)


def test_a_full_disk_is_out_of_space_and_other_errors_pass():
    with pytest.raises(OutOfSpace), files.space_errors("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), files.space_errors("x"):
        raise PermissionError(errno.EACCES, "no")


def test_hashes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"")
    assert files.hash_file(path) == files.hash_bytes(b"")
    path.write_bytes(b"abc")
    assert files.hash_file(path) == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
