"""What is special about blobs in files: crashes, full disks, modes."""

import errno
import os
import time

import pytest

from recess.blobs import LocalBlobs, MemoryBlobs
from recess.errors import BadInput, Corrupt, OutOfSpace, Unavailable
from recess.testing.crash import crashing


@pytest.fixture
def blobs(tmp_path):
    return LocalBlobs(tmp_path / "blobs")


def _temps(blobs):
    return list((blobs.root / ".tmp").iterdir())


@pytest.mark.parametrize("point", ["blobs.before_sync", "blobs.before_link"])
def test_a_crash_before_the_link_leaves_nothing_visible(blobs, point):
    with crashing(point):
        blobs.put("a/k", b"data")
    assert not blobs.exists("a/k")
    assert list(blobs.list_blobs()) == []
    assert len(_temps(blobs)) == 1
    assert blobs.clean(before_s=time.time() - 60) == 0
    assert blobs.clean(before_s=time.time() + 60) == 1
    assert _temps(blobs) == []
    assert blobs.put("a/k", b"data") is True


def test_a_crash_after_the_link_leaves_a_whole_blob(blobs):
    with crashing("blobs.before_folder_sync"):
        blobs.put("a/k", b"data")
    assert blobs.get("a/k", max_bytes=4) == b"data"
    assert blobs.clean(before_s=time.time() + 60) == 1
    assert blobs.get("a/k", max_bytes=4) == b"data"


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EIO, Unavailable)]
)
def test_a_failing_disk_leaves_no_file(blobs, monkeypatch, code, error):
    def fail(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        blobs.put("k", b"data")
    monkeypatch.undo()
    assert _temps(blobs) == []
    assert not blobs.exists("k")


@pytest.mark.parametrize("point", ["blobs.before_sync", "blobs.before_link"])
def test_a_crash_before_a_draft_has_its_name_leaves_nothing_visible(blobs, point):
    draft = blobs.draft()
    draft.write(b"data")
    with crashing(point):
        draft.put("a/k")
    assert list(blobs.list_blobs()) == []
    assert len(_temps(blobs)) == 1
    assert blobs.clean(before_s=time.time() + 60) == 1


def test_a_draft_on_a_failing_disk_leaves_no_file(blobs, monkeypatch):
    draft = blobs.draft()

    def fail(fd, views):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", fail)
    with pytest.raises(OutOfSpace):
        draft.write(b"data")
    draft.drop()
    assert _temps(blobs) == []


def test_a_draft_is_on_its_way_to_the_disk_before_its_end(blobs, monkeypatch):
    begun = []
    monkeypatch.setattr("recess.blobs.local._write_back", lambda fd, how: begun.append(how))
    draft = blobs.draft()
    for _ in range(5):
        draft.write(bytes(600_000))
    assert begun == [2, 2]  # a step of 1 MiB is two of these pieces; nobody waits
    draft.flush()
    assert begun[2:] == [7]  # for this one does
    draft.put("k")
    assert blobs.stat("k").size_bytes == 3_000_000


def test_blobs_are_private_and_read_only(blobs):
    blobs.put("a/k", b"data")
    assert (blobs.root / "a/k").stat().st_mode & 0o777 == 0o400
    assert (blobs.root / "a").stat().st_mode & 0o777 == 0o700


def test_a_key_that_is_a_folder_is_refused(blobs):
    blobs.put("a/k", b"data")
    with pytest.raises(BadInput):
        blobs.put("a", b"data")
    assert _temps(blobs) == []


def test_a_root_that_is_a_file_is_unavailable(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(Unavailable):
        LocalBlobs(tmp_path / "f")


def test_short_reads_and_writes_are_continued(blobs, monkeypatch):
    real_pread, real_writev = os.pread, os.writev
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real_pread(fd, min(n, 7), at))
    monkeypatch.setattr(os, "writev", lambda fd, views: real_writev(fd, [views[0][:5]]))
    data = os.urandom(100)
    blobs.put("k", [data[:33], data[33:]])
    assert blobs.get("k", max_bytes=100) == data
    monkeypatch.setattr(os, "pread", lambda fd, n, at: b"")
    with pytest.raises(Corrupt):
        blobs.get("k", max_bytes=100)


def test_memory_can_be_full():
    blobs = MemoryBlobs(capacity_bytes=10)
    blobs.put("a", b"12345678")
    with pytest.raises(OutOfSpace):
        blobs.put("b", b"123")
    assert not blobs.exists("b")
