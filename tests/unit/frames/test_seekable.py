"""Seekable files: random access, the standard tool, and every lie a file can tell."""

import itertools
import os
import shutil
import struct
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3

from recess.errors import Corrupt, Incompatible
from recess.frames import FRAME_RAW_BYTES_MAX, FrameEncoder, SeekableReader, WorkPool, build_seekable, decode_frame
from recess.frames.index import decode_index
from recess.frames.index_v2 import encode_index
from recess.frames.seekable import _batches
from recess.frames.table import table_of

KIND = b"TEST"
RAWS = [bytes([i]) * (i * 37) + b"recess" for i in range(20)] + [b""]


@pytest.fixture(scope="module")
def pool():
    pool = WorkPool()
    yield pool
    pool.close()


def build(pool, raws=RAWS, extra=b"the extra"):
    file = build_seekable(KIND, len(raws), raws.__getitem__, extra, level=1, pool=pool)
    return file, b"".join(file.pieces)


def open_bytes(data, index_hash, reads=None):
    def read(offset, length):
        if reads is not None:
            reads.append((offset, length))
        if offset < 0 or length < 0 or offset + length > len(data):
            raise Corrupt("short")
        return data[offset : offset + length]

    return SeekableReader(read, len(data), index_hash, KIND, "test")


def test_no_more_batches_are_begun_than_told(pool):
    """Of 100 tasks, when the third result has been taken: those three, and so many behind it."""
    begun = []
    results = pool.in_order([lambda n=n: begun.append(n) or n for n in range(100)], ahead=4)
    taken = list(itertools.islice(results, 3))
    results.close()
    assert taken == [0, 1, 2]
    assert set(range(3)) <= set(begun) <= set(range(3 + 4))
    assert list(pool.in_order([lambda n=n: n for n in range(9)], ahead=2)) == list(range(9))
    slowly = build_seekable(KIND, len(RAWS), RAWS.__getitem__, b"the extra", level=1, pool=pool, ahead=1)
    assert b"".join(slowly.pieces) == build(pool)[1]


def test_any_frame_in_any_order(pool):
    file, data = build(pool)
    assert file.size_bytes == len(data)
    reader = open_bytes(data, file.index_hash)
    assert reader.extra == b"the extra"
    assert [reader.frame(i) for i in (20, 0, 7)] == [RAWS[20], RAWS[0], RAWS[7]]
    found = {}
    reader.frames(np.array([0, 1, 5, 6, 7, 19]), found.__setitem__, pool)
    assert found == {i: RAWS[i] for i in (0, 1, 5, 6, 7, 19)}
    assert reader.raw(pool, max_bytes=1 << 20) == b"".join(RAWS)
    with pytest.raises(Corrupt):
        reader.raw(pool, max_bytes=100)


def test_neighbouring_frames_take_one_read(pool):
    file, data = build(pool)
    reads = []
    reader = open_bytes(data, file.index_hash, reads)
    assert len(reads) == 1
    reader.frames(np.array([2, 3, 4]), lambda *_: None, pool)
    assert len(reads) == 2


@pytest.mark.parametrize("number", [-1, 21, 1 << 40])
def test_a_frame_that_is_not_there(pool, number):
    file, data = build(pool)
    with pytest.raises(Corrupt):
        open_bytes(data, file.index_hash).frames(np.array([number]), lambda *_: None, pool)


def test_an_index_larger_than_the_first_read(pool):
    extra = bytes(range(256)) * 1000
    file, data = build(pool, extra=extra)
    reads = []
    reader = open_bytes(data, file.index_hash, reads)
    assert reader.extra == extra
    assert len(reads) == 2


def test_no_frames_at_all(pool):
    file, data = build(pool, raws=[])
    assert open_bytes(data, file.index_hash).raw(pool, max_bytes=0) == b""


def test_the_standard_tool_unpacks_it(pool, tmp_path):
    tool = shutil.which("zstd")
    if tool is None:
        pytest.skip("the zstd program is not installed")
    _, data = build(pool)
    path = tmp_path / "file.zst"
    path.write_bytes(data)
    assert subprocess.run([tool, "-dc", path], capture_output=True, check=True).stdout == b"".join(RAWS)
    listed = subprocess.run([tool, "-l", path], capture_output=True, check=True, text=True).stdout
    assert listed.split("\n")[1].split()[:2] == [str(len(RAWS) + 2), "2"]


def test_the_seek_table_is_the_standard_one(pool):
    _, data = build(pool)
    count, descriptor, magic = struct.unpack("<IBI", data[-9:])
    assert (count, descriptor, magic) == (len(RAWS) + 1, 0, 0x8F92EAB1)
    size = 8 * count + 9
    assert struct.unpack("<II", data[-size - 8 : -size]) == (0x184D2A5E, size)
    entries = struct.unpack(f"<{2 * count}I", data[-size:-9])
    assert sum(entries[::2]) == len(data) - size - 8
    assert list(entries[1::2]) == [*map(len, RAWS), 0]


def test_every_flipped_byte_and_every_truncation_is_noticed(pool):
    raws = [b"a" * 300, b"bc" * 50, b""]
    file, data = build(pool, raws=raws, extra=b"xyz")

    def all_of(damaged):
        open_bytes(damaged, file.index_hash).raw(pool, max_bytes=1 << 20)

    all_of(data)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(Corrupt):
            all_of(bytes(damaged))
    for size in range(len(data)):
        with pytest.raises(Corrupt):
            all_of(data[:size])
    with pytest.raises(Corrupt):
        all_of(data + b"\0")


def test_another_files_hash_is_refused(pool):
    _, data = build(pool)
    with pytest.raises(Corrupt):
        open_bytes(data, blake3(b"other").hexdigest())


def test_an_index_of_another_kind_or_version():
    table = table_of([FrameEncoder(1).encode(b"x")], level=1)
    good = encode_index(KIND, table, b"e")
    assert decode_index(good, KIND, "n")[1] == b"e"
    with pytest.raises(Corrupt):
        decode_index(good, b"LAYR", "n")
    with pytest.raises(Incompatible):
        decode_index(good[:8] + b"\x03\0" + good[10:], KIND, "n")
    for at in (0, 16, 20):  # magic, counts
        with pytest.raises(Corrupt):
            decode_index(good[:at] + b"\xff" + good[at + 1 :], KIND, "n")
    huge = replace(table, raw=np.array([FRAME_RAW_BYTES_MAX + 1], np.uint32))
    with pytest.raises(Corrupt):
        decode_index(encode_index(KIND, huge, b""), KIND, "n")


@pytest.mark.parametrize("claim", [0, 99, 101, 1000])
def test_a_frame_that_lies_about_its_size(claim):
    frame = FrameEncoder(1).encode(b"a" * 100)
    with pytest.raises(Corrupt):
        decode_frame(frame.data, claim, frame.hash, "n")


def test_a_bomb_is_stopped_at_the_claimed_size():
    frame = FrameEncoder(1).encode(bytes(FRAME_RAW_BYTES_MAX))
    with pytest.raises(Corrupt):
        decode_frame(frame.data, 4096, frame.hash, "n")


@pytest.mark.parametrize("junk", [b"", b"not zstd at all", b"\x28\xb5\x2f\xfd"])
def test_junk_with_a_right_hash(junk):
    with pytest.raises(Corrupt):
        decode_frame(junk, 5, blake3(junk).digest(), "n")


def test_bytes_after_the_frame():
    data = FrameEncoder(1).encode(b"abc").data + b"more"
    with pytest.raises(Corrupt):
        decode_frame(data, 3, blake3(data).digest(), "n")


def test_a_frame_over_the_cap_is_not_written():
    with pytest.raises(ValueError, match="at most"):
        FrameEncoder(1).encode(bytes(FRAME_RAW_BYTES_MAX + 1))


def test_when_one_task_fails_the_others_have_ended(pool):
    done = []

    def fail():
        raise Corrupt("no")

    with pytest.raises(Corrupt):
        pool.each([fail, *[lambda i=i: done.append(i) for i in range(20)]])
    assert sorted(done) == list(range(20))


def test_a_frame_that_claims_to_be_larger_than_its_content_is_refused_unread(pool):
    """A fuzzer's find: reading it would have taken as many bytes of memory as it said."""
    stored = build_seekable(KIND, 3, lambda n: bytes([n]) * 5000, b"", level=1, pool=pool)
    index = bytearray(encode_index(KIND, stored.table, b""))
    index[24:28] = (1 << 31).to_bytes(4, "little")
    with pytest.raises(Corrupt, match="larger than its content"):
        decode_index(bytes(index), KIND, "liar")
    noise = build_seekable(KIND, 1, lambda n: os.urandom(FRAME_RAW_BYTES_MAX), b"", level=1, pool=pool)
    decode_index(encode_index(KIND, noise.table, b""), KIND, "noise")  # the largest there is


def test_a_task_asks_for_its_frames_together(pool):
    """Afar that is one request, or a few side by side; and nothing is handed out before all of it came."""
    file, data = build(pool)
    asked = []

    def read_many(ranges):
        asked.append(list(ranges))
        return [data[offset : offset + length] for offset, length in ranges]

    reader = SeekableReader(
        lambda offset, length: data[offset : offset + length], len(data), file.index_hash, KIND, "test",
        read_many=read_many, at_once=5,
    )  # fmt: skip
    found = {}
    reader.frames(np.array([0, 1, 5, 6, 7, 19, 20]), found.__setitem__, pool)
    assert found == {i: RAWS[i] for i in (0, 1, 5, 6, 7, 19, 20)}
    offsets = reader.table.offsets
    spans = {(int(offsets[a]), int(offsets[b] - offsets[a])) for a, b in ((0, 2), (5, 8), (19, 21))}
    assert sorted(map(len, asked)) == [1, 2]
    assert {span for ranges in asked for span in ranges} == spans


@pytest.mark.parametrize("at_once", [1, 3, 8, 64])
def test_batches_hold_every_number_once(at_once):
    rng = np.random.default_rng(at_once)
    numbers = np.flatnonzero(rng.integers(0, 2, 200))
    batches = list(_batches(numbers, at_once))
    assert all(0 < sum(count for _, count in runs) <= at_once for runs in batches)
    assert [n for runs in batches for first, count in runs for n in range(first, first + count)] == numbers.tolist()
    assert all(a + n < b for runs in batches for (a, n), (b, _) in itertools.pairwise(runs))
    assert list(_batches(numbers[:0], at_once)) == []
