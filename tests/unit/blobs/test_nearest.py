"""Copies nearer by are read first; what they lack, or cannot give, the store gives."""

import pytest

from recess.blobs import LocalBlobs, MemoryBlobs, MeteredBlobs, NearestBlobs
from recess.errors import NotFound


def test_a_copy_is_read_and_the_rest_asked_for(tmp_path):
    copies, store = LocalBlobs(tmp_path), MeteredBlobs(MemoryBlobs())
    blobs = NearestBlobs(copies, store)
    for key in ("near", "far"):
        store.put(key, b"0123456789")
    copies.put("near", b"0123456789")
    before = store.traffic
    assert blobs.get("near", max_bytes=10) == b"0123456789"
    assert blobs.get_range("near", 2, 3) == b"234"
    assert blobs.get_ranges("near", [(0, 1), (9, 1)]) == [b"0", b"9"]
    assert blobs.stat("near").size_bytes == 10
    assert store.traffic == before
    assert blobs.get("far", max_bytes=10) == b"0123456789"
    assert blobs.get_range("far", 2, 3) == b"234"
    assert blobs.get_ranges("far", [(0, 1)]) == [b"0"]
    assert blobs.stat("far").size_bytes == 10
    assert (store.traffic - before).read_bytes == 14
    assert not copies.exists("far")  # it makes no copies
    copies.delete("near")  # by its owner, at any time
    assert blobs.get_range("near", 2, 3) == b"234"
    with pytest.raises(NotFound):
        blobs.get_range("nowhere", 0, 1)


def test_a_copy_that_is_cut_short_is_no_copy(tmp_path):
    copies, store = LocalBlobs(tmp_path), MemoryBlobs()
    store.put("k", b"0123456789")
    copies.put("k", b"01")
    assert NearestBlobs(copies, store).get_range("k", 2, 3) == b"234"
