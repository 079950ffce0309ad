"""The tree as text."""

from recess.cli.verbs.snapshot_tree import tree_lines


def node(ref, parent="", **more):
    return {
        "id": ref, "kind": "snapshot", "names": [], "parent": parent, "damaged": False, "needed_by": [], "why": "idle",
        "machine": "mch_1", "machine_name": "dev", "created": float(more.pop("created", 1.0)), "stored": 10, "owned": 4,
        "shared": 6, "frees": 4, "branch_frees": 9, **more,
    }  # fmt: skip


def shape(lines):
    return [line.split("  ")[0] if line.startswith("snp") else line[: line.index("snp") + 5] for line in lines[:-1]]


def test_branches():
    nodes = [
        node("snp_a"), node("snp_b", "snp_a", created=2), node("snp_c", "snp_a", created=3),
        node("snp_d", "snp_b", created=4), node("snp_e", "gone", created=9),
    ]  # fmt: skip
    assert shape(tree_lines(nodes, 99)) == ["snp_a", "├─ snp_b", "│  └─ snp_d", "└─ snp_c", "snp_e"]


def test_what_a_line_says():
    lines = tree_lines(
        [
            {**node("snp_t"), "kind": "template", "image": "base", "why": ""},
            node("snp_a", "snp_t", names=["base:v1", "base"], needed_by=["machine dev"]),
            {"id": "snp_x", "kind": "snapshot", "names": [], "parent": "", "damaged": True, "needed_by": []},
        ],
        2_000_000,
    )
    assert "template of base" in "\n".join(lines)
    line = next(one for one in lines if "snp_a" in one)
    assert "(base:v1, base)" in line
    assert "owned 4 B shared 6 B frees 4 B (branch 9 B)" in line
    assert line.endswith("<- machine dev")
    assert any("snp_x  DAMAGED" in one for one in lines)
    assert lines[-1].startswith("3 in 2.0 MB")


def test_a_loop_hides_nothing():
    lines = tree_lines([node("snp_a", "snp_b"), node("snp_b", "snp_a")], 1)
    assert len(lines) == 3
