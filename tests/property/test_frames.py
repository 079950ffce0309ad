"""Seekable files against a list of byte strings."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.frames import SeekableReader, WorkPool, build_seekable

POOL = WorkPool()


@settings(max_examples=60, deadline=None)
@given(
    raws=st.lists(st.one_of(st.binary(max_size=300), st.binary(max_size=4).map(lambda b: b * 999)), max_size=40),
    extra=st.binary(max_size=50),
    level=st.integers(-3, 5),
    wanted=st.sets(st.integers(0, 39)),
)
def test_a_seekable_file_is_a_list_of_byte_strings(raws, extra, level, wanted):
    file = build_seekable(b"TEST", len(raws), raws.__getitem__, extra, level=level, pool=POOL)
    data = b"".join(file.pieces)
    reader = SeekableReader(lambda at, n: data[at : at + n], len(data), file.index_hash, b"TEST", "t")
    numbers = sorted(n for n in wanted if n < len(raws))
    found = {}
    reader.frames(np.array(numbers, np.int64), found.__setitem__, POOL)
    assert found == {n: raws[n] for n in numbers}
    assert reader.extra == extra
    assert reader.raw(POOL, max_bytes=1 << 30) == b"".join(raws)
