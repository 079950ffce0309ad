"""Copies of remote blobs: fetched once, verified, bounded, and never more than a copy."""

import threading

import pytest

from recess.blobs import CachingBlobs, LocalBlobs, MemoryBlobs, MeteredBlobs, SparingBlobs
from recess.blobs.caching import unchecked
from recess.errors import Corrupt, NotFound, OutOfSpace
from recess.testing.crash import crashing

KIB = 1024


@pytest.fixture
def remote():
    return MeteredBlobs(MemoryBlobs())


@pytest.fixture
def make(tmp_path, remote):
    def build(max_bytes=100 * KIB, whole=50 * KIB, check=unchecked, local=None):
        local = local or LocalBlobs(tmp_path / "copies")
        return CachingBlobs(remote, local, check, max_bytes=max_bytes, whole_max_bytes=whole)

    return build


def test_a_blob_is_fetched_once(make, remote):
    remote.put("a/k", b"x" * KIB)
    cache = make()
    before = remote.traffic
    assert cache.get_range("a/k", 5, 3) == b"xxx"
    assert cache.get("a/k", max_bytes=KIB) == b"x" * KIB
    assert cache.get_ranges("a/k", [(0, 1), (9, 1)]) == [b"x", b"x"]
    assert (remote.traffic - before).read_bytes == KIB
    assert (cache.state.hits, cache.state.misses) == (2, 1)


def test_copies_outlive_the_process(make, remote):
    remote.put("a/k", b"x" * KIB)
    make().get("a/k", max_bytes=KIB)
    before = remote.traffic
    cache = make()
    assert cache.state.bytes == KIB
    cache.get("a/k", max_bytes=KIB)
    assert remote.traffic == before


def test_what_was_put_is_at_hand(make, remote):
    cache = make()
    assert cache.put("k", b"x" * KIB) is True
    before = remote.traffic
    assert cache.get("k", max_bytes=KIB) == b"x" * KIB
    assert remote.traffic == before
    assert cache.put("k", b"other") is False
    assert cache.get("k", max_bytes=KIB) == b"x" * KIB


def test_the_folder_is_bounded_and_the_oldest_goes(make, remote):
    cache = make(max_bytes=10 * KIB, whole=4 * KIB)
    for number in range(4):
        remote.put(f"k{number}", bytes([number]) * 4 * KIB)
    for name in ("k0", "k1", "k0", "k2"):  # k1 was not read for longest
        cache.get(name, max_bytes=4 * KIB)
    assert cache.state.bytes <= 10 * KIB
    assert cache.missing_bytes([("k0", 4 * KIB), ("k1", 4 * KIB), ("k2", 4 * KIB)]) == 4 * KIB
    for number in range(4):
        assert cache.get(f"k{number}", max_bytes=4 * KIB) == bytes([number]) * 4 * KIB
        assert cache.state.bytes <= 10 * KIB


def test_a_smaller_bound_holds_at_the_next_start(make, remote):
    for number in range(5):
        remote.put(f"k{number}", bytes(4 * KIB))
        make().get(f"k{number}", max_bytes=4 * KIB)
    assert make(max_bytes=9 * KIB).state.bytes <= 9 * KIB


def test_a_folder_that_somebody_emptied(make, remote):
    remote.put("k", b"x" * KIB)
    cache = make()
    cache.get("k", max_bytes=KIB)
    cache._local.delete("k")
    assert cache.get("k", max_bytes=KIB) == b"x" * KIB
    assert cache.state.bytes == 0
    assert cache.get_range("k", 0, 1) == b"x"
    assert cache.state.bytes == KIB


def test_only_what_is_to_be_kept_is(remote, tmp_path):
    cache = CachingBlobs(
        remote, LocalBlobs(tmp_path), refuse, max_bytes=KIB, whole_max_bytes=KIB, kept=lambda key: key.startswith("a/")
    )
    cache.put("b/k", b"put here")
    remote.put("b/other", b"read here")
    assert cache.get("b/k", max_bytes=100) == b"put here"
    assert cache.get_range("b/other", 0, 4) == b"read"
    assert cache.state.blobs == 0


def test_a_large_blob_is_read_by_ranges(make, remote):
    remote.put("big", bytes(60 * KIB))
    cache = make()
    before = remote.traffic
    assert cache.get_range("big", 100, 50) == bytes(50)
    assert cache.get_range("big", 200, 50) == bytes(50)
    assert (remote.traffic - before).read_bytes == 100
    assert (remote.traffic - before).other_calls == 1  # its size was asked for once
    assert cache.state.blobs == 0


def refuse(key, size, read, pieces):
    yield from pieces
    raise Corrupt(f"{key} is not what its key says", blob=key)


def test_what_fails_the_check_is_neither_kept_nor_served(make, remote):
    remote.put("k", b"damaged")
    cache = make(check=refuse)
    for _ in range(2):
        with pytest.raises(Corrupt, match="not what its key says"):
            cache.get("k", max_bytes=100)
    assert cache.state.blobs == 0
    assert list(cache._local.list_blobs()) == []


def test_a_crash_while_a_copy_is_made_leaves_none(make, remote):
    remote.put("k", b"x" * KIB)
    with crashing("blobs.before_link"):
        make().get("k", max_bytes=KIB)
    cache = make()
    assert cache.state.blobs == 0
    assert list((cache._local.root / ".tmp").iterdir()) == []
    assert cache.get("k", max_bytes=KIB) == b"x" * KIB


def test_a_full_disk_only_makes_reads_slower(make, remote, tmp_path):
    class Full(LocalBlobs):
        def put_stream(self, key, source):
            for _ in source():
                raise OutOfSpace("no space")
            return False

    remote.put("k", b"x" * KIB)
    cache = make(local=Full(tmp_path / "full"))
    assert cache.get("k", max_bytes=KIB) == b"x" * KIB
    assert cache.get_range("k", 1, 2) == b"xx"
    assert cache.put("new", b"y") is True
    assert cache.get("new", max_bytes=1) == b"y"
    assert cache.state.blobs == 0


def test_a_damaged_copy_can_be_dropped(make, remote):
    remote.put("k", b"good")
    cache = make()
    cache.get("k", max_bytes=4)
    path = cache._local.root / "k"
    path.chmod(0o600)
    path.write_bytes(b"evil")
    assert cache.get("k", max_bytes=4) == b"evil"
    assert cache.drop("k") is True
    assert cache.get("k", max_bytes=4) == b"good"
    assert cache.drop("never") is False


def test_the_remote_store_says_what_exists(make, remote):
    cache = make()
    cache.put("k", b"x")
    remote.delete("k")
    assert not cache.exists("k")
    with pytest.raises(NotFound):
        cache.stat("k")
    assert list(cache.list_blobs()) == []


def test_readers_of_one_blob_fetch_it_once(make, remote):
    remote.put("k", b"x" * KIB)
    cache = make()
    before = remote.traffic
    gate = threading.Barrier(8)
    found = []

    def read():
        gate.wait()
        found.append(cache.get_range("k", 0, KIB))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"x" * KIB] * 8
    assert (remote.traffic - before).read_bytes == KIB


def test_all_copies_may_go_at_any_time(make, remote):
    remote.put("a/one", b"1" * 50)
    remote.put("a/two", b"2" * 30)
    cache = make()
    cache.get("a/one", max_bytes=100)
    cache.get("a/two", max_bytes=100)
    assert cache.empty() == 80
    assert cache.empty() == 0
    assert cache.state.bytes == cache.state.blobs == 0
    assert cache.get("a/one", max_bytes=100) == b"1" * 50
    assert cache.state.bytes == 50


def test_who_reads_little_of_a_large_blob_makes_no_copy_but_uses_one(make, remote):
    remote.put("big/one", b"0123456789" * KIB)
    remote.put("small/one", b"abc")
    cache = make()
    sparing = SparingBlobs(cache, lambda key: key.startswith("big/"))
    before = remote.traffic
    assert sparing.get_range("big/one", 3, 2) == b"34"
    assert (remote.traffic - before).read_bytes == 2
    assert cache.state.blobs == 0
    assert sparing.get_range("small/one", 0, 1) == b"a"
    assert cache.state.blobs == 1
    cache.get("big/one", max_bytes=1 << 20)  # somebody else reads it whole
    before = remote.traffic
    assert sparing.get_ranges("big/one", [(0, 1), (9, 1)]) == [b"0", b"9"]
    assert remote.traffic == before
    cache._local.delete("big/one")  # the folder was emptied by hand
    assert sparing.get_range("big/one", 5, 1) == b"5"
