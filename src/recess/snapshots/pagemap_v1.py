"""Version 1 of the page map's nodes: a tree of three levels, each node named by the BLAKE3-256 of its bytes.

All numbers are little-endian. A page that no leaf lists comes from the base (template, or zeros without one).

    leaf (512 pages)   u8 type = 1, u8 version = 1, u16 table size t, u16 runs r, u16 zero,
                       u8 kind[t] (1 blocks, 2 layer), 32 bytes hash[t],
                       u16 first page in leaf[r], u16 pages[r], u16 source[r] (0 zeros, else 1 + place in table),
                       u32 position[r] (block or slot of the run's first page; 0 for zeros)
    inner (128 leaves) u8 type = 2, u8 version = 1, u16 children c, u32 zero, u16 which child[c], 32 bytes hash[c]
    root (the part)    u8 type = 3, u8 version = 1, u16 zero, u32 children c, u64 pages in the part,
                       u32 which child[c], 32 bytes hash[c]

A leaf says nothing of where it is, and names its sources by hash: an unchanged leaf is the same node in the next
snapshot, in another part, in a fork. Runs and children ascend; absent children are all base.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from recess.errors import Corrupt, Incompatible
from recess.snapshots.pagemap import (
    KIND_BLOCKS,
    KIND_LAYER,
    PAGES_MAX,
    ZERO,
    PageMap,
    Source,
    expand,
    runs_of,
)

VERSION = 1
LEAF_PAGES = 512
INNER_LEAVES = 128
INNER_PAGES = LEAF_PAGES * INNER_LEAVES
_LEAF, _INNER, _ROOT = 1, 2, 3
_LEAF_HEAD = struct.Struct("<BBHHH")
_INNER_HEAD = struct.Struct("<BBHI")
_ROOT_HEAD = struct.Struct("<BBHIQ")
_HASH = 32

Fetch = Callable[[bytes], bytes]  # hash -> the bytes of the node; Corrupt if there is none
_Numbers = NDArray[np.int64]
Children = list[tuple[int, bytes]]  # (which child, its hash)


@dataclass(frozen=True)
class _Leaf:
    """One leaf as it lies in its node: `columns` are the bytes of first page, pages and source of its runs, `position` those
    of their positions; `sources` is its own table. What the numbers say is checked for all leaves together."""

    runs: int
    listed: int
    columns: tuple[bytes, bytes, bytes]
    position: bytes
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Tree:
    """An encoded map: the root's hash, nodes by hash, and the hash of every leaf by its number. `nodes` lacks the leaves
    that were known before (`encode_leaves` makes them)."""

    root: bytes
    nodes: dict[bytes, bytes]
    leaves: dict[int, bytes]


def encode_tree(page_map: PageMap) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the root's hash and all nodes by hash. Equal maps give equal bytes."""
    tree = encode_changed(page_map, {})
    return tree.root, tree.nodes


def encode_changed(page_map: PageMap, known: Mapping[int, bytes]) -> Tree:
    """Encode a map. `known`: hashes of leaves that are as they were in another map of this
    part (`pagemap.same_leaves`): these are not encoded again."""
    nodes: dict[bytes, bytes] = {}

    def add(node: bytes) -> bytes:
        digest = blake3(node).digest()
        nodes[digest] = node
        return digest

    wanted = np.setdiff1d(page_map.pages // LEAF_PAGES, np.array(list(known), np.int64)) if known else None
    leaves = {**known, **{number: add(node) for number, node in _encode_leaves(page_map, wanted)}}
    inners: dict[int, Children] = {}
    for number, digest in sorted(leaves.items()):
        inners.setdefault(number // INNER_LEAVES, []).append((number % INNER_LEAVES, digest))
    children = [(number, add(_encode_inner(below))) for number, below in inners.items()]
    head = _ROOT_HEAD.pack(_ROOT, VERSION, 0, len(children), page_map.pages_total)
    return Tree(add(head + _encode_children(children, "<u4")), nodes, leaves)


def encode_leaves(page_map: PageMap, numbers: Iterable[int]) -> list[tuple[int, bytes]]:
    """Return (number, leaf) of those of these leaves that list anything, ascending."""
    return _encode_leaves(page_map, np.array(sorted(numbers), np.int64))


def _encode_inner(children: Children) -> bytes:
    return _INNER_HEAD.pack(_INNER, VERSION, len(children), 0) + _encode_children(children, "<u2")


def _encode_children(children: Children, dtype: str) -> bytes:
    return np.array([n for n, _ in children], dtype).tobytes() + b"".join(digest for _, digest in children)


def _encode_leaves(page_map: PageMap, wanted: NDArray[np.int64] | None) -> list[tuple[int, bytes]]:
    """Return (number, leaf) of all leaves, or of those wanted."""
    if wanted is not None:
        page_map = page_map.select(np.isin(page_map.pages // LEAF_PAGES, wanted))
    starts = runs_of(page_map, LEAF_PAGES)
    if not len(starts):
        return []
    counts = np.diff(starts, append=page_map.count).astype("<u2")
    pages = page_map.pages[starts]
    first = (pages % LEAF_PAGES).astype("<u2")
    source, position = page_map.source[starts], page_map.position[starts].astype("<u4")
    leaf = pages // LEAF_PAGES
    cuts = [0, *(np.flatnonzero(np.diff(leaf)) + 1).tolist(), len(starts)]
    out = []
    for low, high in itertools.pairwise(cuts):
        used = np.unique(source[low:high])
        used = used[used != ZERO]
        local = np.where(source[low:high] == ZERO, 0, np.searchsorted(used, source[low:high]) + 1).astype("<u2")
        table = [page_map.sources[n - 1] for n in used.tolist()]
        node = b"".join(
            (
                _LEAF_HEAD.pack(_LEAF, VERSION, len(table), high - low, 0),
                bytes(entry.kind for entry in table),
                *(entry.digest for entry in table),
                first[low:high].tobytes(),
                counts[low:high].tobytes(),
                local.tobytes(),
                position[low:high].tobytes(),
            )
        )
        out.append((int(leaf[low]), node))
    return out


def decode_tree(root: bytes, fetch: Fetch, *, pages_total: int, count: int) -> PageMap:
    """Return the map below `root`, which must be of `pages_total` pages and list `count` of them.

    Raises Corrupt or Incompatible. Nodes may be shared within the tree, so what it expands to is bounded by the
    caller's `count`, checked before anything is expanded.
    """
    total, children = _decode_root(_get(root, fetch))
    if total != pages_total or not 0 <= count <= total:
        raise _corrupt(f"root is of {total} pages, not {pages_total}")
    leaves: dict[bytes, _Leaf] = {}
    tables: dict[bytes, tuple[Source, ...]] = {}
    placed: list[tuple[int, _Leaf]] = []
    listed = 0
    for which_inner, inner in children:
        for which_leaf, digest in _decode_inner(_get(inner, fetch)):
            leaf = leaves.get(digest)
            if leaf is None:
                leaf = leaves[digest] = _decode_leaf(_get(digest, fetch), tables)
            listed += leaf.listed
            if listed > count:
                raise _corrupt(f"lists more than the {count} pages it should")
            placed.append((which_inner * INNER_PAGES + which_leaf * LEAF_PAGES, leaf))
    if listed != count:
        raise _corrupt(f"lists {listed} pages, not {count}")
    return _join(placed, pages_total)


def _join(placed: list[tuple[int, _Leaf]], pages_total: int) -> PageMap:
    """Return the map of these leaves, which list no more than the caller has bounded. A large part has hundreds of them with
    a run each, so nothing here is done leaf by leaf but what must be."""
    if not placed:
        nothing = np.empty(0, np.uint32)
        return PageMap(pages_total, nothing, np.empty(0, np.int32), nothing, ())
    leaves = [leaf for _, leaf in placed]
    runs = np.array([leaf.runs for leaf in leaves], np.int64)
    of = np.repeat(np.arange(len(leaves)), runs)
    first, counts, local = (
        np.frombuffer(b"".join([leaf.columns[i] for leaf in leaves]), "<u2").astype(np.int64) for i in range(3)
    )
    position = np.frombuffer(b"".join([leaf.position for leaf in leaves]), "<u4").astype(np.int64)
    _check_runs(of, first, counts, local, position, np.array([len(leaf.sources) for leaf in leaves], np.int64)[of])
    sources, source = _number_sources(leaves, of, local)
    pages = expand(np.array([base for base, _ in placed], np.int64)[of] + first, counts)
    if int(pages[-1]) >= pages_total:
        raise _corrupt("lists a page beyond the part")
    each_source = np.repeat(source, counts)
    each_position = np.where(each_source == ZERO, 0, expand(position, counts))
    if int(each_position.max()) > 0xFFFFFFFF:
        raise _corrupt("a run leaves its source")
    return PageMap(pages_total, pages.astype(np.uint32), each_source, each_position.astype(np.uint32), sources)


def _check_runs(
    of: _Numbers, first: _Numbers, counts: _Numbers, source: _Numbers, position: _Numbers, table_size: _Numbers
) -> None:
    """Check the runs of all leaves; `of` says whose each is, `table_size` how many sources that leaf has. Raises Corrupt."""
    ends = first + counts
    overlap = (first[1:] < ends[:-1]) & (of[1:] == of[:-1])
    if int(counts.min()) < 1 or int(ends.max()) > LEAF_PAGES or overlap.any():
        raise _corrupt("leaf has runs that overlap or leave it")
    if (source > table_size).any() or position[source == ZERO].any():
        raise _corrupt("leaf has a run from nowhere")


def _number_sources(
    leaves: Sequence[_Leaf], of: _Numbers, local: _Numbers
) -> tuple[tuple[Source, ...], NDArray[np.int32]]:
    """Return all sources in order, and the number of each run's. Leaves mostly have the same few tables."""
    tables = {leaf.sources: 0 for leaf in leaves}
    sources = tuple(sorted({source for table in tables for source in table}))
    number = {source: 1 + i for i, source in enumerate(sources)}
    flat: list[int] = []
    for table in tables:
        tables[table] = len(flat)
        flat += [ZERO, *(number[source] for source in table)]
    bases = np.array([tables[leaf.sources] for leaf in leaves], np.int64)
    return sources, np.array(flat, np.int32)[bases[of] + local]


def _corrupt(why: str) -> Corrupt:
    return Corrupt(f"page map: {why}", blob="page map")


def _get(digest: bytes, fetch: Fetch) -> bytes:
    node = fetch(digest)
    if blake3(node).digest() != digest:
        raise _corrupt(f"node {digest.hex()[:12]} does not match its hash")
    return node


def _unpack(node: bytes, head: struct.Struct, kind: int) -> tuple[int, ...]:
    if len(node) < head.size:
        raise _corrupt("node too short")
    values: tuple[int, ...] = head.unpack_from(node)
    if values[0] != kind:
        raise _corrupt("node of another kind than expected")
    if values[1] != VERSION:
        raise Incompatible(f"page map version {values[1]} is unknown here", reasons=[f"page map version {values[1]}"])
    return values


def _decode_children(node: bytes, at: int, count: int, dtype: str, limit: int) -> Children:
    width = np.dtype(dtype).itemsize
    if len(node) != at + count * (width + _HASH):
        raise _corrupt("node size does not match its count")
    which = np.frombuffer(node, dtype, count, at).astype(np.int64)
    if count and (int(which[-1]) >= limit or (np.diff(which) <= 0).any()):
        raise _corrupt("children out of order or out of range")
    base = at + count * width
    return [(n, node[base + _HASH * i : base + _HASH * (i + 1)]) for i, n in enumerate(which.tolist())]


def _decode_root(node: bytes) -> tuple[int, Children]:
    _, _, zero, count, pages_total = _unpack(node, _ROOT_HEAD, _ROOT)
    if zero or pages_total > PAGES_MAX:
        raise _corrupt(f"root of {pages_total} pages makes no sense")
    return pages_total, _decode_children(node, _ROOT_HEAD.size, count, "<u4", -(-pages_total // INNER_PAGES))


def _decode_inner(node: bytes) -> Children:
    _, _, count, zero = _unpack(node, _INNER_HEAD, _INNER)
    if zero or not count:
        raise _corrupt("inner node makes no sense")
    return _decode_children(node, _INNER_HEAD.size, count, "<u2", INNER_LEAVES)


def _decode_leaf(node: bytes, tables: dict[bytes, tuple[Source, ...]]) -> _Leaf:
    """Return a leaf whose sizes are right. `tables`: those that were read before, by their bytes."""
    _, _, table_size, runs, zero = _unpack(node, _LEAF_HEAD, _LEAF)
    if zero or not runs or len(node) != _LEAF_HEAD.size + table_size * (1 + _HASH) + runs * 10:
        raise _corrupt("leaf size does not match its counts")
    at = _LEAF_HEAD.size + table_size * (1 + _HASH)
    raw = node[_LEAF_HEAD.size : at]
    sources = tables.get(raw)
    if sources is None:
        sources = tables[raw] = _decode_table(raw, table_size)
    first, pages, source = (node[at + 2 * runs * i : at + 2 * runs * (i + 1)] for i in range(3))
    listed = sum(struct.unpack(f"<{runs}H", pages))
    if listed < runs:  # each lists a page at least: so the number of runs is bounded with that of pages
        raise _corrupt("leaf has runs that overlap or leave it")
    return _Leaf(runs, listed, (first, pages, source), node[at + 6 * runs :], sources)


def _decode_table(raw: bytes, size: int) -> tuple[Source, ...]:
    kinds, hashes = raw[:size], raw[size:]
    sources = tuple(Source(kind, hashes[_HASH * i : _HASH * (i + 1)]) for i, kind in enumerate(kinds))
    if any(kind not in (KIND_BLOCKS, KIND_LAYER) for kind in kinds) or list(sources) != sorted(set(sources)):
        raise _corrupt("leaf has a bad table of sources")
    return sources
