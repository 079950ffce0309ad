"""Who depends on whom, and what deleting frees: small pictures, and the sums against brute force."""

from hypothesis import given
from hypothesis import strategies as st

from recess.snapshots.lineage import Shape, dependents, shares, tree_parents


def shape(ref, files=(), *, made=(), parent="", template="", size=10):
    return Shape(ref, parent, template, dict.fromkeys(files, size), frozenset(made), 1)


def by_id(*shapes):
    return {one.id: one for one in shapes}


def test_a_child_depends_on_the_only_maker_of_a_file_it_uses():
    one = shape("a", ["f", "g"], made=["f", "g"])
    two = shape("b", ["f", "h"], made=["h"], parent="a")
    assert dependents("a", by_id(one, two)) == ["b"]
    assert dependents("b", by_id(one, two)) == []


def test_a_file_that_another_wrote_too_binds_nobody():
    """The same bytes written again are the same file: deleting one of its makers changes nothing."""
    one = shape("a", ["f"], made=["f"])
    twin = shape("b", ["f"], made=["f"])
    child = shape("c", ["f"], parent="a")
    assert dependents("a", by_id(one, twin)) == []
    assert dependents("a", by_id(one, twin, child)) == []
    assert dependents("a", by_id(one, child)) == ["c"]


def test_a_template_is_part_of_what_its_snapshots_mean():
    base, child = shape("t", ["f"], made=["f"]), shape("a", ["g"], made=["g"], template="t")
    assert dependents("t", by_id(base, child)) == ["a"]
    assert dependents("unknown", by_id(base, child)) == []
    found = shares(by_id(base, child), {"t": "", "a": "t"})
    assert (found["t"].frees, found["t"].owned) == (0, 11)
    assert found["t"].branch_frees == 22


def test_the_tree_falls_back_and_has_no_loops():
    shapes = by_id(shape("t"), shape("a", parent="gone", template="t"), shape("b", parent="a"), shape("c", parent="b"))
    assert tree_parents(shapes, {}) == {"t": "", "a": "t", "b": "a", "c": "b"}
    assert tree_parents(shapes, {"c": "a"})["c"] == "a"
    looped = tree_parents(shapes, {"a": "c", "b": "a", "c": "b"})
    for ref in looped:
        steps = 0
        while looped[ref]:
            ref, steps = looped[ref], steps + 1
            assert steps < 9


graphs = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-1, n - 1), min_size=n, max_size=n),
        st.lists(st.sets(st.integers(0, 7), max_size=6), min_size=n, max_size=n),
    )
)


@given(graphs)
def test_the_sums_are_those_of_brute_force(graph):
    parents, files = graph
    names = "abcdefghi"
    shapes = by_id(*(
        shape(names[i], [f"f{f}" for f in files[i]], parent=names[parents[i]] if 0 <= parents[i] < i else "")
        for i in range(len(files))
    ))  # fmt: skip
    tree = tree_parents(shapes, {})
    found = shares(shapes, tree)

    def stored(kept):
        return 10 * len({f for ref in kept for f in shapes[ref].files}) + len(kept)

    def branch(ref):
        return {ref}.union(*(branch(child) for child in tree if tree[child] == ref))

    everything = stored(shapes)
    for ref in shapes:
        assert found[ref].stored == stored([ref])
        assert found[ref].owned + found[ref].shared == found[ref].stored
        assert found[ref].frees == found[ref].owned == everything - stored([r for r in shapes if r != ref])
        assert found[ref].branch_frees == everything - stored([r for r in shapes if r not in branch(ref)])
