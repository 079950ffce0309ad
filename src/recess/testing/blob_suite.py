"""The conformance suite of blob stores: subclass `BlobStoreSuite`, give it a `blobs` fixture, and run it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from recess.blobs.contract import BlobStore, read_pieces
from recess.blobs.draft import draft_of
from recess.errors import BadInput, Corrupt, NotFound

_FAR = 1 << 40


class BlobStoreSuite:
    """What every `BlobStore` must do. The `blobs` fixture yields an empty store."""

    def test_get_returns_what_put_stored(self, blobs: BlobStore) -> None:
        assert blobs.put("a/b", b"hello") is True
        assert blobs.get("a/b", max_bytes=5) == b"hello"
        assert blobs.stat("a/b").size_bytes == 5
        assert blobs.exists("a/b")

    def test_pieces_are_joined(self, blobs: BlobStore) -> None:
        many = [bytes([i % 251]) * (i % 5) for i in range(3000)]
        blobs.put("k", many)
        assert blobs.get("k", max_bytes=_FAR) == b"".join(many)
        blobs.put("v", [memoryview(b"xy"), bytearray(b"z")])
        assert blobs.get("v", max_bytes=3) == b"xyz"

    def test_wide_views_are_bytes(self, blobs: BlobStore) -> None:
        blobs.put("k", memoryview(bytes(range(16))).cast("I"))
        assert blobs.get("k", max_bytes=16) == bytes(range(16))

    def test_an_empty_blob_is_a_blob(self, blobs: BlobStore) -> None:
        assert blobs.put("empty", b"") is True
        assert blobs.get("empty", max_bytes=0) == b""
        assert blobs.get_range("empty", 0, 0) == b""

    def test_the_first_put_wins_and_renews_the_time(self, blobs: BlobStore) -> None:
        blobs.put("k", b"first")
        before = blobs.stat("k").modified_s
        deadline = time.monotonic() + 5
        while blobs.stat("k").modified_s == before and time.monotonic() < deadline:
            assert blobs.put("k", b"second") is False
        assert blobs.get("k", max_bytes=_FAR) == b"first"
        assert blobs.stat("k").modified_s > before

    def test_touch_renews_the_time(self, blobs: BlobStore) -> None:
        assert blobs.touch("d/k") is False
        assert not blobs.exists("d/k")
        blobs.put("d/k", b"x")
        before = blobs.stat("d/k").modified_s
        deadline = time.monotonic() + 5
        while blobs.stat("d/k").modified_s == before and time.monotonic() < deadline:
            assert blobs.touch("d/k") is True
        after = blobs.stat("d/k").modified_s
        assert after > before
        assert [info.modified_s for info in blobs.list_blobs("d/")] == [after]
        blobs.delete("d/k")
        assert blobs.touch("d/k") is False
        assert list(blobs.list_blobs()) == []

    def test_a_stream_is_stored_whole(self, blobs: BlobStore) -> None:
        assert blobs.put_stream("s/k", lambda: iter([b"ab", b"", bytearray(b"c"), memoryview(b"d")])) is True
        assert blobs.get("s/k", max_bytes=4) == b"abcd"
        assert blobs.put_stream("s/k", lambda: iter([b"other"])) is False
        assert blobs.get("s/k", max_bytes=4) == b"abcd"
        assert blobs.put_stream("s/empty", lambda: iter([])) is True
        assert blobs.get("s/empty", max_bytes=0) == b""

    def test_a_long_stream_is_stored_whole(self, blobs: BlobStore) -> None:
        piece = bytes(range(256)) * (1 << 12)  # 1 MiB
        assert blobs.put_stream("s/long", lambda: (piece for _ in range(21))) is True
        assert blobs.stat("s/long").size_bytes == 21 << 20
        assert blobs.get_range("s/long", (20 << 20) + 5, 10) == piece[5:15]
        assert blobs.put_stream("s/long", lambda: (piece for _ in range(22))) is False
        assert blobs.stat("s/long").size_bytes == 21 << 20
        assert [info.key for info in blobs.list_blobs()] == ["s/long"]
        assert b"".join(read_pieces(blobs, "s/long", 21 << 20, piece_bytes=(4 << 20) + 1)) == piece * 21

    def test_a_large_blob_is_stored_whole(self, blobs: BlobStore) -> None:
        data = bytes(range(251)) * 80_000  # 20 MB
        assert blobs.put("large", [data[:7], data[7:]]) is True
        assert blobs.put("large", data + b"x") is False
        assert blobs.get("large", max_bytes=len(data)) == data
        assert [info.key for info in blobs.list_blobs()] == ["large"]

    @pytest.mark.parametrize("pieces", [1, 20])
    def test_a_stream_that_fails_stores_nothing(self, blobs: BlobStore, pieces: int) -> None:
        def source() -> Iterator[bytes]:
            yield from (bytes(1 << 20) for _ in range(pieces))
            raise Corrupt("it is not what it should be")

        with pytest.raises(Corrupt, match="not what it should be"):
            blobs.put_stream("s/k", source)
        assert not blobs.exists("s/k")
        assert list(blobs.list_blobs()) == []
        assert blobs.put_stream("s/k", lambda: iter([b"good"])) is True

    def test_a_draft_is_a_put(self, blobs: BlobStore) -> None:
        draft = draft_of(blobs)
        pieces = [bytes([i % 251]) * 4099 for i in range(700)]
        for piece in pieces:
            draft.write(piece)
        assert not blobs.exists("d/k")
        assert draft.put("d/k") is True
        draft.drop()
        assert blobs.get("d/k", max_bytes=_FAR) == b"".join(pieces)

    def test_a_draft_of_what_is_there_changes_nothing(self, blobs: BlobStore) -> None:
        blobs.put("d/k", b"first")
        draft = draft_of(blobs)
        draft.write(bytearray(b"second"))
        assert draft.put("d/k") is False
        assert blobs.get("d/k", max_bytes=_FAR) == b"first"
        assert blobs.clean(before_s=time.time() + 60) == 0

    def test_a_dropped_draft_leaves_nothing(self, blobs: BlobStore) -> None:
        draft = draft_of(blobs)
        draft.write(memoryview(b"something"))
        draft.drop()
        draft.drop()
        assert list(blobs.list_blobs()) == []
        assert blobs.clean(before_s=time.time() + 60) == 0

    def test_many_ranges_at_once(self, blobs: BlobStore) -> None:
        blobs.put("k", bytes(range(200)))
        asked = [(190, 10), (0, 3), (3, 0), (200, 0), (50, 100), (2, 2)]
        assert blobs.get_ranges("k", asked) == [bytes(range(o, o + n)) for o, n in asked]
        assert blobs.get_ranges("k", []) == []
        for bad in ([(0, 1), (199, 2)], [(0, 1), (-1, 1)], [(0, 1), (201, 0)], [(500, 1), (0, 1)]):
            with pytest.raises(Corrupt):
                blobs.get_ranges("k", bad)
        with pytest.raises(NotFound):
            blobs.get_ranges("no", [(0, 1), (5, 1)])

    def test_missing_keys(self, blobs: BlobStore) -> None:
        blobs.put("there/file", b"x")
        for key in ("no", "no/such/key", "there", "there/file/below"):
            assert not blobs.exists(key)
            assert blobs.delete(key) is False
            with pytest.raises(NotFound) as caught:
                blobs.get(key, max_bytes=1)
            assert caught.value.details["ref"] == key
            with pytest.raises(NotFound):
                blobs.get_range(key, 0, 1)
            with pytest.raises(NotFound):
                blobs.stat(key)
        assert blobs.get("there/file", max_bytes=1) == b"x"

    def test_ranges_are_exact(self, blobs: BlobStore) -> None:
        blobs.put("k", bytes(range(100)))
        assert blobs.get_range("k", 10, 20) == bytes(range(10, 30))
        assert blobs.get_range("k", 0, 100) == bytes(range(100))
        assert blobs.get_range("k", 100, 0) == b""
        for offset, length in ((99, 2), (101, 0), (0, 101), (-1, 1), (5, -1)):
            with pytest.raises(Corrupt):
                blobs.get_range("k", offset, length)

    def test_a_cap_on_reading(self, blobs: BlobStore) -> None:
        blobs.put("k", b"12345")
        with pytest.raises(Corrupt) as caught:
            blobs.get("k", max_bytes=4)
        assert caught.value.details["blob"] == "k"

    def test_delete(self, blobs: BlobStore) -> None:
        blobs.put("d/k", b"x")
        assert blobs.delete("d/k") is True
        assert blobs.delete("d/k") is False
        assert not blobs.exists("d/k")
        assert blobs.put("d/k", b"y") is True
        assert blobs.get("d/k", max_bytes=1) == b"y"

    def test_list(self, blobs: BlobStore) -> None:
        stored = {"layers/aa": b"1", "layers/ab": b"22", "log/s/aa": b"333", "top": b""}
        for key, data in stored.items():
            blobs.put(key, data)
        assert {i.key: i.size_bytes for i in blobs.list_blobs()} == {k: len(v) for k, v in stored.items()}
        assert sorted(i.key for i in blobs.list_blobs("layers/")) == ["layers/aa", "layers/ab"]
        assert [i.key for i in blobs.list_blobs("layers/ab")] == ["layers/ab"]
        assert [i.key for i in blobs.list_blobs("log/")] == ["log/s/aa"]
        assert sorted(i.key for i in blobs.list_blobs("l")) == ["layers/aa", "layers/ab", "log/s/aa"]
        assert list(blobs.list_blobs("none/")) == []
        info = next(blobs.list_blobs("top"))
        assert abs(info.modified_s - time.time()) < 60

    @pytest.mark.parametrize(
        "key",
        ["", "/", "/a", "a/", "a//b", "../a", "a/../b", ".tmp/x", "A", "a b", "a\n", "a\0b", "é", "a/b/c/d/e", "x" * 201],
    )  # fmt: skip
    def test_bad_keys_are_refused_everywhere(self, blobs: BlobStore, key: str) -> None:
        with pytest.raises(BadInput):
            blobs.put(key, b"")
        with pytest.raises(BadInput):
            blobs.put_stream(key, lambda: iter([b""]))
        with pytest.raises(BadInput):
            blobs.touch(key)
        with pytest.raises(BadInput):
            blobs.get_ranges(key, [(0, 1)])
        with pytest.raises(BadInput):
            blobs.get(key, max_bytes=1)
        with pytest.raises(BadInput):
            blobs.get_range(key, 0, 1)
        with pytest.raises(BadInput):
            blobs.delete(key)
        with pytest.raises(BadInput):
            blobs.stat(key)
        with pytest.raises(BadInput):
            blobs.exists(key)

    def test_racing_puts_of_one_key_have_one_winner(self, blobs: BlobStore) -> None:
        wins: list[int] = []
        gate = threading.Barrier(6)

        def race(number: int) -> None:
            gate.wait()
            if blobs.put("raced", bytes([number]) * 5000):
                wins.append(number)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert blobs.get("raced", max_bytes=5000) == bytes(wins) * 5000

    def test_clean_leaves_blobs_alone(self, blobs: BlobStore) -> None:
        blobs.put("k", b"x")
        assert blobs.clean(before_s=time.time() + 1000) == 0
        assert blobs.get("k", max_bytes=1) == b"x"
