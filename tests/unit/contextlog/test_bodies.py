import os

import pytest

from recess.blobs import LocalBlobs
from recess.contextlog.bodies import BlobBodies, DirectoryBodies, MemoryBodies
from recess.errors import Corrupt, Unavailable

FAR_S = 1e12
DATA = b'{"output":"' + b"spam " * 10_000 + b'"}'


@pytest.fixture(params=["memory", "directory", "blobs"])
def bodies(request, tmp_path):
    if request.param == "blobs":
        return BlobBodies(LocalBlobs(tmp_path / "blobs"), "log_1")
    return MemoryBodies() if request.param == "memory" else DirectoryBodies(tmp_path / "bodies")


def test_what_was_put_comes_back(bodies):
    for data in (DATA, b"", os.urandom(100_000)):
        digest = bodies.put(data)
        assert bodies.put(data) == digest
        assert bodies.get(digest, len(data)) == data


def test_a_missing_body_and_a_wrong_size_are_corrupt(bodies):
    digest = bodies.put(DATA)
    for name, size in (("0" * 64, 5), (digest, len(DATA) - 1), (digest, len(DATA) + 1), ("../../etc/passwd", 5)):
        with pytest.raises(Corrupt):
            bodies.get(name, size)


def file_of(tmp_path):
    (found,) = [p for p in (tmp_path / "b").rglob("*") if p.is_file()]
    return found


def test_files_are_compressed_private_and_leave_no_temporary_names(tmp_path):
    bodies = DirectoryBodies(tmp_path / "b")
    bodies.put(DATA)
    path = file_of(tmp_path)
    assert path.stat().st_size < len(DATA) // 50
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damage_is_found(tmp_path, damage):
    bodies = DirectoryBodies(tmp_path / "b")
    data = os.urandom(30_000)
    digest = bodies.put(data)
    path = file_of(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    other = DirectoryBodies(tmp_path / "c").put(os.urandom(30_000))
    wrong = {
        "flip": bytes(raw),
        "cut": path.read_bytes()[:-100],
        "empty": b"",
        "other": (tmp_path / "c" / other[:2] / other).read_bytes(),
    }
    path.write_bytes(wrong[damage])
    with pytest.raises(Corrupt, match=digest[:16]):
        bodies.get(digest, len(data))


def test_a_bomb_is_not_unpacked(tmp_path):
    bodies = DirectoryBodies(tmp_path / "b")
    digest = bodies.put(b"small")
    big = DirectoryBodies(tmp_path / "c").put(bytes(50 << 20))
    file_of(tmp_path).write_bytes((tmp_path / "c" / big[:2] / big).read_bytes())
    with pytest.raises(Corrupt):
        bodies.get(digest, 5)


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable):
        DirectoryBodies(tmp_path / "file" / "b").put(DATA)


def test_what_is_old_can_be_dropped_unless_it_was_put_again(bodies):
    one, two = bodies.put(b"1" * 100), bodies.put(b"2" * 100)
    assert list(bodies.older_than(0.0)) == []
    found = dict(bodies.older_than(FAR_S))
    assert set(found) == {one, two}
    assert all(size > 0 for size in found.values())
    assert bodies.drop(one, 0.0) is False  # put since then
    assert bodies.drop(one, FAR_S) is True
    assert bodies.drop(one, FAR_S) is False
    assert bodies.get(two, 100) == b"2" * 100
    with pytest.raises(Corrupt):
        bodies.get(one, 100)


def test_what_an_interrupted_put_left_behind_is_dropped(tmp_path):
    bodies = DirectoryBodies(tmp_path / "bodies")
    digest = bodies.put(DATA)
    left = tmp_path / "bodies" / digest[:2] / ".new-abc"
    left.write_bytes(b"half")
    assert sorted(dict(bodies.older_than(FAR_S))) == [".new-abc", digest]
    assert bodies.drop(".new-abc", FAR_S) is True
    assert not left.exists()


def test_putting_what_is_there_makes_it_young(tmp_path):
    bodies = DirectoryBodies(tmp_path / "bodies")
    digest = bodies.put(DATA)
    os.utime(tmp_path / "bodies" / digest[:2] / digest, (1.0, 1.0))
    assert dict(bodies.older_than(2.0))
    assert bodies.put(DATA) == digest
    assert dict(bodies.older_than(2.0)) == {}
    assert bodies.drop(digest, 2.0) is False
