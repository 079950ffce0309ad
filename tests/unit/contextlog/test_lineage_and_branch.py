from recess.contextlog import lineage
from recess.contextlog.branch import Mark, TailPlan, on_branch, plan_tail
from recess.contextlog.contract import Entry
from recess.contextlog.lineage import Range


def test_ranges_and_clipping():
    ranges = lineage.ranges_of("c", [Range("a", 1, 4), Range("b", 5, 6)], 6, 9)
    assert ranges == [Range("a", 1, 4), Range("b", 5, 6), Range("c", 7, 9)]
    assert lineage.ranges_of("c", [], 0, 0) == []
    assert lineage.clip(ranges, 3, 7) == [Range("a", 4, 4), Range("b", 5, 6), Range("c", 7, 7)]
    assert lineage.clip(ranges, 9, 99) == []
    assert lineage.clip(ranges, 0, 0) == []
    assert lineage.decode(lineage.encode(ranges)) == ranges


def test_plan_takes_no_more_marks_than_it_needs():
    def marks():
        yield Mark(90, "compact", 80)
        yield Mark(50, "system", 0)
        raise AssertionError("the past was read")

    assert plan_tail(marks()) == TailPlan(80, 50)


def test_plans():
    assert plan_tail([]) == TailPlan(0, 0)
    assert plan_tail([Mark(9, "rewind", 4), Mark(6, "compact", 5), Mark(3, "compact", 2)]) == TailPlan(2, 0)
    assert plan_tail(
        [Mark(9, "compact", 8), Mark(7, "rewind", 1), Mark(5, "system", 0), Mark(1, "system", 0)]
    ) == TailPlan(8, 1)


def entries(size, rewinds):
    return [
        Entry("s", p, "rewind" if p in rewinds else "note", {"to": rewinds.get(p)}, 0, "", "", 1, "v", 0.0, 1)
        for p in range(1, size + 1)
    ]


def positions(size, rewinds):
    return [e.position for e in on_branch(entries(size, rewinds))]


def test_rewinds():
    assert positions(5, {}) == [1, 2, 3, 4, 5]
    assert positions(7, {6: 3}) == [1, 2, 3, 6, 7]
    assert positions(4, {4: 0}) == [4]
    assert positions(9, {5: 3, 8: 4}) == [1, 2, 3, 4, 8, 9]  # the first rewind is undone by the second
    assert positions(9, {5: 3, 8: 6}) == [1, 2, 3, 5, 6, 8, 9]
    assert positions(3, {3: 7}) == [1, 2, 3]  # nonsense does nothing
