"""Joining ranges: what is read, and that everybody gets theirs."""

from hypothesis import given
from hypothesis import strategies as st

from recess.blobs.ranges import join_ranges


def test_near_ranges_are_one_read():
    (one,) = join_ranges([(0, 10), (15, 5)], gap_bytes=5)
    assert (one.offset, one.length) == (0, 20)
    assert one.wanted == ((0, 0, 10), (1, 15, 5))


def test_far_ranges_stay_apart():
    assert [(j.offset, j.length) for j in join_ranges([(16, 5), (0, 10)], gap_bytes=5)] == [(0, 10), (16, 5)]


def test_a_join_has_a_cap():
    joined = join_ranges([(0, 10), (10, 10), (20, 10)], gap_bytes=5, most_bytes=20)
    assert [(j.offset, j.length) for j in joined] == [(0, 20), (20, 10)]
    assert [(j.offset, j.length) for j in join_ranges([(0, 50)], most_bytes=20)] == [(0, 50)]


RANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 56)), max_size=20)


@given(RANGES, st.integers(0, 40), st.integers(1, 100))
def test_everybody_gets_their_bytes(ranges, gap, most):
    data = bytes(i % 256 for i in range(256))
    out = {}
    for part in join_ranges(ranges, gap_bytes=gap, most_bytes=most):
        assert part.length <= max(most, max(n for _, n in ranges))
        read = data[part.offset : part.offset + part.length]
        assert len(read) == part.length
        for place, start, length in part.wanted:
            assert place not in out
            out[place] = read[start : start + length]
    assert [out[i] for i in range(len(ranges))] == [data[o : o + n] for o, n in ranges]
