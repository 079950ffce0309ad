"""A recoded file: the same name, the same content, another coding; and nothing it says is believed."""

import shutil
import subprocess
import threading

import numpy as np
import pytest

from recess.errors import Corrupt, Incompatible, Unsupported
from recess.frames import RecodedReader, SeekableReader, WorkPool, build_seekable, recode
from recess.frames.table import FrameTable

KIND = b"TEST"
RAWS = [bytes([i % 7]) * 900 + b"recess %d" % i for i in range(21)]


@pytest.fixture(scope="module")
def pool():
    pool = WorkPool()
    yield pool
    pool.close()


def reader_of(data):
    def read(offset, length):
        if offset < 0 or length < 0 or offset + length > len(data):
            raise Corrupt("short")
        return data[offset : offset + length]

    return read


@pytest.fixture(scope="module")
def original(pool):
    file = build_seekable(KIND, len(RAWS), RAWS.__getitem__, b"the extra", level=1, pool=pool)
    data = b"".join(file.pieces)
    return SeekableReader(reader_of(data), len(data), file.index_hash, KIND, "test"), file.index_hash, data


def open_recoded(data, index_hash):
    return RecodedReader(reader_of(data), len(data), index_hash, KIND, "test")


def recoded(original, **how):
    return b"".join(recode(original, **({"level": 9, "frame_bytes": 4 * 910} | how)))


def test_it_looks_like_the_original(original, pool):
    first, name, data = original
    other = recoded(first)
    assert len(other) != len(data)
    found = open_recoded(other, name)
    assert (found.extra, found.table.count, found.own_table.level, first.table.level) == (b"the extra", 21, 9, 1)
    assert found.raw(pool, max_bytes=1 << 20) == b"".join(RAWS)
    assert [found.frame(i) for i in (20, 0, 7)] == [RAWS[20], RAWS[0], RAWS[7]]
    got = {}
    found.frames(np.array([0, 1, 5, 6, 7, 19]), got.__setitem__, pool)
    assert got == {i: RAWS[i] for i in (0, 1, 5, 6, 7, 19)}
    with pytest.raises(Corrupt):
        found.frame(21)


def test_larger_frames_are_smaller(original):
    first, _, _ = original
    assert len(recoded(first, frame_bytes=1 << 20)) < len(recoded(first, frame_bytes=1))


def test_it_can_be_recoded_again(original, pool):
    first, name, _ = original
    again = recoded(open_recoded(recoded(first), name), level=3, frame_bytes=1)
    assert open_recoded(again, name).raw(pool, max_bytes=1 << 20) == b"".join(RAWS)


def test_the_standard_tool_unpacks_it(original, tmp_path):
    tool = shutil.which("zstd")
    if tool is None:
        pytest.skip("the zstd program is not installed")
    path = tmp_path / "file.zst"
    path.write_bytes(recoded(original[0]))
    assert subprocess.run([tool, "-dc", path], capture_output=True, check=True).stdout == b"".join(RAWS)


def test_every_flipped_byte_and_every_truncation_is_noticed(original, pool):
    first, name, _ = original
    data = recoded(first)

    def all_of(damaged):
        open_recoded(damaged, name).raw(pool, max_bytes=1 << 20)

    all_of(data)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises((Corrupt, Incompatible)):
            all_of(bytes(damaged))
    for size in range(len(data)):
        with pytest.raises(Corrupt):
            all_of(data[:size])
    with pytest.raises(Corrupt):
        all_of(data + b"\0")


def test_another_content_under_the_name_is_refused(original, pool):
    """Whole and consistent in itself, but not what the name says: whoever made it up."""
    first, name, _ = original
    lie = [*RAWS[:3], RAWS[4], RAWS[3], *RAWS[5:]]
    assert [len(a) for a in lie] == [len(a) for a in RAWS]
    file = build_seekable(KIND, len(lie), lie.__getitem__, b"the extra", level=1, pool=pool)
    data = b"".join(file.pieces)
    liar = SeekableReader(reader_of(data), len(data), file.index_hash, KIND, "liar")
    with pytest.raises(Corrupt):
        open_recoded(recoded(liar), name)  # another index
    liar.index = first.index  # the right index before another content
    with pytest.raises(Corrupt, match="content does not match"):
        open_recoded(recoded(liar), name).raw(pool, max_bytes=1 << 20)


def test_a_file_that_does_not_prove_its_content_cannot_be_recoded(original):
    _, name, data = original
    old = SeekableReader(reader_of(data), len(data), name, KIND, "test")
    old.table = FrameTable(old.table.compressed, old.table.raw, old.table.hashes)  # as version 1 says it
    with pytest.raises(Unsupported):
        recoded(old)


def test_a_wrong_content_hash_is_found_before_anything_is_swapped(original):
    _, name, data = original
    other = SeekableReader(reader_of(data), len(data), name, KIND, "test")
    wrong = other.table.contents.copy()
    wrong[3] ^= 1
    other.table = FrameTable(other.table.compressed, other.table.raw, other.table.hashes, wrong)
    with pytest.raises(Corrupt, match="frame 3"):
        recoded(other)


def test_it_stops_when_told(original):
    class Stop(Exception):
        pass

    seen = []

    def go_on():
        seen.append(1)
        if len(seen) == 3:
            raise Stop

    with pytest.raises(Stop):
        recoded(original[0], go_on=go_on)


def test_from_several_threads(original):
    first, name, _ = original
    found = open_recoded(recoded(first), name)
    wrong = []

    def all_of(order):
        wrong.extend(i for i in order if found.frame(i) != RAWS[i])

    threads = [
        threading.Thread(target=all_of, args=(np.random.default_rng(n).permutation(21).tolist(),)) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
