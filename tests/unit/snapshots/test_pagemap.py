"""Page maps in memory and as nodes: canonical, shared, and no lie gets through."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3

from recess.errors import Corrupt, Incompatible
from recess.snapshots.pagemap import KIND_BLOCKS, KIND_LAYER, PAGES_MAX, PageMap, Source, expand, merge, runs_of
from recess.snapshots.pagemap_v1 import INNER_PAGES, decode_tree, encode_tree

LAYER = Source(KIND_LAYER, b"L" * 32)
FILE = Source(KIND_BLOCKS, b"F" * 32)


def page_map(total, entries):
    """Build a map from {page: (source or None, position)}."""
    pages = np.array(sorted(entries), np.uint32)
    rows = {}
    for row, page in enumerate(pages.tolist()):
        source, position = entries[page]
        rows.setdefault(source, ([], []))
        rows[source][0].append(row)
        rows[source][1].append(position)
    return merge(total, pages, {s: (np.array(r, np.int64), np.array(p, np.int64)) for s, (r, p) in rows.items()})


def entries_of(found):
    sources = [None, *found.sources]
    triples = zip(found.pages.tolist(), found.source.tolist(), found.position.tolist(), strict=True)
    return {page: (sources[source], position) for page, source, position in triples}


EXAMPLE = {
    0: (LAYER, 5), 1: (LAYER, 6), 2: (LAYER, 9), 3: (None, 0), 4: (None, 0), 6: (FILE, 100), 7: (FILE, 101),
    511: (LAYER, 0), 512: (LAYER, 1), 70000: (FILE, 0xFFFFFFFF), 70001: (LAYER, 0xFFFFFFFF),
}  # fmt: skip
TOTAL = 70002


def decode(root, nodes, total=TOTAL, count=11):
    return decode_tree(root, nodes.__getitem__, pages_total=total, count=count)


def test_a_tree_reads_back():
    root, nodes = encode_tree(page_map(TOTAL, EXAMPLE))
    assert entries_of(decode(root, nodes)) == EXAMPLE
    assert len(nodes) == 3 + 2 + 1  # leaves, inner nodes, root
    assert all(blake3(node).digest() == digest for digest, node in nodes.items())


def test_an_empty_map_is_a_root_alone():
    root, nodes = encode_tree(page_map(10, {}))
    assert len(nodes) == 1
    assert decode(root, nodes, 10, 0).count == 0


def test_runs_end_at_leaves_and_where_a_neighbour_is_no_neighbour():
    assert runs_of(page_map(TOTAL, EXAMPLE), 512).tolist() == [0, 2, 3, 5, 7, 8, 9, 10]


def test_counts_and_rows_by_source():
    found = page_map(TOTAL, EXAMPLE)
    assert found.counts() == (2, 3, 6)
    assert {source: len(rows) for source, rows in found.rows_by_source().items()} == {None: 2, FILE: 3, LAYER: 6}
    assert entries_of(found.between(3, 512)) == {p: e for p, e in EXAMPLE.items() if 3 <= p < 512}


def test_a_change_makes_three_new_nodes():
    _, before = encode_tree(page_map(TOTAL, EXAMPLE))
    root, after = encode_tree(page_map(TOTAL, EXAMPLE | {3: (LAYER, 77)}))
    assert len(after.keys() - before.keys()) == 3  # leaf, inner, root
    assert decode(root, before | after).count == len(EXAMPLE)


def test_a_leaf_does_not_know_where_it_is():
    shifted = {page + 512 * 3: entry for page, entry in EXAMPLE.items() if page < 512}
    _, nodes = encode_tree(page_map(TOTAL, {p: e for p, e in EXAMPLE.items() if p < 512}))
    _, others = encode_tree(page_map(TOTAL, shifted))
    assert len(nodes.keys() & others.keys()) == 1


def test_expand():
    assert expand(np.array([5, 1]), np.array([2, 3])).tolist() == [5, 6, 1, 2, 3]
    assert expand(np.array([], np.int64), np.array([], np.int64)).tolist() == []


def test_equal_nodes_cannot_expand_beyond_the_count():
    """A few bytes may describe a terabyte; the count that the manifest admits to is the limit."""
    zeros = np.arange(INNER_PAGES, dtype=np.uint32)
    full = PageMap(INNER_PAGES, zeros, np.zeros(INNER_PAGES, np.int32), np.zeros(INNER_PAGES, np.uint32), ())
    _, nodes = encode_tree(full)
    assert len(nodes) == 3
    inner = next(digest for digest, node in nodes.items() if node[0] == 2)
    many = PAGES_MAX // INNER_PAGES
    lie = struct.pack("<BBHIQ", 3, 1, 0, many, PAGES_MAX) + np.arange(many, dtype="<u4").tobytes() + inner * many
    nodes[blake3(lie).digest()] = lie
    with pytest.raises(Corrupt):
        decode(blake3(lie).digest(), nodes, PAGES_MAX, 1000)


def _with(node, at, value):
    return node[:at] + value + node[at + len(value) :]


def leaf_with(change):
    """Return root and nodes of a map of one leaf, after `change` to its bytes."""
    _, nodes = encode_tree(page_map(512, {0: (LAYER, 5), 1: (LAYER, 6), 9: (FILE, 1)}))
    leaf = change(next(node for node in nodes.values() if node[0] == 1))
    digest = blake3(leaf).digest()
    inner = struct.pack("<BBHIH", 2, 1, 1, 0, 0) + digest
    root = struct.pack("<BBHIQI", 3, 1, 0, 1, 512, 0) + blake3(inner).digest()
    return blake3(root).digest(), {blake3(n).digest(): n for n in (leaf, inner, root)}


# leaf: 8 bytes head, 2 kinds, 2 x 32 hashes, then 2 runs: first (u16) at 74, pages at 78, source at 82, position at 86
LIES = {
    "type": lambda n: _with(n, 0, b"\x02"),
    "reserved": lambda n: _with(n, 6, b"\x01"),
    "no runs": lambda n: _with(n, 4, b"\x00"),
    "runs beyond the node": lambda n: _with(n, 4, b"\xff\xff"),
    "table beyond the node": lambda n: _with(n, 2, b"\xff\xff"),
    "kind": lambda n: _with(n, 8, b"\x03"),
    "table out of order": lambda n: _with(n, 8, b"\x02\x01"),
    "run of nothing": lambda n: _with(n, 78, b"\x00\x00"),
    "run beyond the leaf": lambda n: _with(n, 80, b"\xff\xff"),
    "runs overlap": lambda n: _with(n, 78, b"\x0a\x00"),
    "source beyond the table": lambda n: _with(n, 82, b"\x03\x00"),
    "zeros with a position": lambda n: _with(n, 82, b"\x00\x00"),
    "position leaves its source": lambda n: _with(n, 86, b"\xff\xff\xff\xff"),
    "too short": lambda n: n[:5],
    "one byte more": lambda n: n + b"\0",
}


def test_the_leaf_of_the_lies_is_good_before():
    root, nodes = leaf_with(lambda n: n)
    assert decode(root, nodes, 512, 3).count == 3


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_lies_in_a_leaf(lie):
    root, nodes = leaf_with(lie)
    with pytest.raises(Corrupt):
        decode(root, nodes, 512, 3)


def test_a_run_that_leaves_its_leaf_within_the_part():
    root, nodes = leaf_with(lambda n: _with(_with(n, 76, b"\xff\x01"), 78, b"\x01\x00\x02\x00"))
    with pytest.raises(Corrupt, match="leave it"):
        decode(root, nodes, 512, 3)


def test_an_unknown_version():
    root, nodes = leaf_with(lambda n: _with(n, 1, b"\x02"))
    with pytest.raises(Incompatible):
        decode(root, nodes, 512, 3)


@pytest.mark.parametrize(("total", "count"), [(513, 3), (512, 2), (512, 4), (512, 600), (512, -1)])
def test_a_tree_that_is_not_what_the_manifest_says(total, count):
    root, nodes = leaf_with(lambda n: n)
    with pytest.raises(Corrupt):
        decode(root, nodes, total, count)


def test_lies_in_root_and_inner():
    leaf_root, nodes = leaf_with(lambda n: n)
    leaf = next(d for d, n in nodes.items() if n[0] == 1)
    inners = [
        struct.pack("<BBHIHH", 2, 1, 2, 0, 1, 0) + leaf * 2,  # out of order
        struct.pack("<BBHIH", 2, 1, 1, 0, 128) + leaf,  # out of range
        struct.pack("<BBHI", 2, 1, 0, 0),  # without children
        struct.pack("<BBHIH", 2, 1, 1, 9, 0) + leaf,  # reserved
        struct.pack("<BBHIH", 2, 1, 1, 0, 1) + leaf,  # a page beyond the part
    ]
    for inner in inners:
        root = struct.pack("<BBHIQI", 3, 1, 0, 1, 512, 0) + blake3(inner).digest()
        more = nodes | {blake3(n).digest(): n for n in (inner, root)}
        with pytest.raises(Corrupt):
            decode(blake3(root).digest(), more, 512, 3)
    root = struct.pack("<BBHIQ", 3, 1, 0, 0, PAGES_MAX + 1)
    with pytest.raises(Corrupt):
        decode(blake3(root).digest(), {blake3(root).digest(): root}, PAGES_MAX + 1, 0)
    with pytest.raises(Corrupt):  # a node under another's hash
        decode(leaf_root, dict.fromkeys(nodes, root), 512, 3)


def test_merge_leaves_out_what_has_no_source():
    found = merge(9, np.array([1, 2, 3], np.uint32), {LAYER: (np.array([1]), np.array([7]))})
    assert entries_of(found) == {2: (LAYER, 7)}
    assert replace(found, pages_total=8).pages_total == 8
