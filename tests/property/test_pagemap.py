"""The page map's tree against a dict."""

from hypothesis import given, settings
from hypothesis import strategies as st

from recess.snapshots.pagemap import KIND_BLOCKS, KIND_LAYER, Source, same_leaves
from recess.snapshots.pagemap_v1 import LEAF_PAGES, decode_tree, encode_changed, encode_leaves, encode_tree
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


maps = st.lists(st.tuples(near, st.integers(1, 700), entry), max_size=12).map(spread)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(maps, maps, st.booleans())
def test_a_map_encoded_over_an_older_one_is_the_same_tree(older, newer, alike):
    """What is known of another map of the part saves encoding, and changes no byte."""
    newer = {**older, **newer} if alike else newer
    old, new = page_map(200_000, older), page_map(200_000, newer)
    before, whole = encode_changed(old, {}), encode_changed(new, {})
    same = same_leaves(old, new, LEAF_PAGES).tolist()
    assert same == sorted(n for n in before.leaves if whole.leaves.get(n) == before.leaves[n])
    tree = encode_changed(new, {number: before.leaves[number] for number in same})
    assert (tree.root, tree.leaves) == (whole.root, whole.leaves)
    known = {tree.leaves[number]: leaf for number, leaf in encode_leaves(new, same)}
    assert tree.nodes | known == whole.nodes
