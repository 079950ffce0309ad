"""The meter counts what was moved, no more."""

import pytest

from recess.blobs import MemoryBlobs, MeteredBlobs, Traffic
from recess.errors import NotFound


def test_what_is_counted():
    blobs = MeteredBlobs(MemoryBlobs())
    blobs.put("k", [b"abc", b"de"])
    blobs.put("k", b"again, and ignored")
    blobs.put_stream("s", lambda: iter([b"12", b"3"]))
    assert blobs.traffic == Traffic(written_calls=3, written_bytes=8)
    before = blobs.traffic
    blobs.get("k", max_bytes=5)
    blobs.get_range("k", 1, 2)
    blobs.get_ranges("s", [(0, 1), (2, 1)])
    assert blobs.traffic - before == Traffic(read_calls=3, read_bytes=9)
    before = blobs.traffic
    blobs.exists("k")
    blobs.stat("k")
    blobs.touch("k")
    list(blobs.list_blobs())
    blobs.delete("k")
    blobs.clean(before_s=0)
    assert blobs.traffic - before == Traffic(other_calls=6)


def test_drafts_count_when_they_are_put():
    blobs = MeteredBlobs(MemoryBlobs())
    for number, (key, data) in enumerate([("k", b"abc"), ("k", b"abc"), ("", b"never")]):
        draft = blobs.draft()
        draft.write(data)
        assert not key or draft.put(key) is (number == 0)
        draft.drop()
    assert blobs.traffic == Traffic(written_calls=2, written_bytes=3)


def test_a_failed_read_moves_nothing():
    blobs = MeteredBlobs(MemoryBlobs())
    with pytest.raises(NotFound):
        blobs.get("no", max_bytes=1)
    with pytest.raises(NotFound):
        blobs.get_range("no", 0, 1)
    assert blobs.traffic == Traffic()
