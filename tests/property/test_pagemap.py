"""The page map's tree against a dict."""

from hypothesis import given, settings
from hypothesis import strategies as st

from recess.snapshots.pagemap import KIND_BLOCKS, KIND_LAYER, Source
from recess.snapshots.pagemap_v1 import decode_tree, encode_tree
from tests.unit.snapshots.test_pagemap import entries_of, page_map

SOURCES = [None, *(Source(kind, bytes([n]) * 32) for kind in (KIND_BLOCKS, KIND_LAYER) for n in range(4))]
near = st.integers(0, 1300) | st.integers(65000, 66000) | st.integers(0, 199_999)
entry = st.tuples(st.sampled_from(SOURCES), st.integers(0, 50))


def spread(stretches):
    out = {}
    for start, count, (source, position) in stretches:
        for i in range(count):
            if start + i < 200_000:
                out[start + i] = (source, position + i if source else 0)
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(near, st.integers(1, 700), entry), max_size=12).map(spread))
def test_a_tree_is_a_dict(entries):
    root, nodes = encode_tree(page_map(200_000, entries))
    found = decode_tree(root, nodes.__getitem__, pages_total=200_000, count=len(entries))
    assert entries_of(found) == entries
    assert encode_tree(found) == (root, nodes)
