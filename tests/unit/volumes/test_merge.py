"""What is done about a volume: one side changed, both did, one is gone; the table of `recess.volumes.merge`, case by case."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.volumes import DIR, FILE, LINK, Entry, Pair, plan
from recess.volumes.merge import GUEST, HOST, IN, OUT, SETTLE, STUCK
from recess.volumes.trees import copied_in, is_name, leads_out, same, time_ns

S = 1_000_000_000
OLD = Entry(FILE, 3, 10 * S)
NEW = Entry(FILE, 5, 20 * S)
NEWER = Entry(FILE, 7, 30 * S)
FOLDER = Entry(DIR)
BOTH = {"f": Pair(OLD, OLD)}


def one(before, host, guest, *, readonly=False):
    steps, kept = plan(before, host, guest, readonly=readonly)
    return [(s.path, s.act, s.loser, s.told) for s in steps], kept


@pytest.mark.parametrize(
    ("before", "host", "guest", "expected"),
    [
        (None, {"f": OLD}, {}, [("f", IN, "", False)]),
        (None, {}, {"f": OLD}, [("f", OUT, "", False)]),
        (None, {"f": OLD}, {"f": OLD}, [("f", SETTLE, "", False)]),
        (None, {"f": OLD}, {"f": NEW}, [("f", OUT, HOST, True)]),
        (None, {"f": NEW}, {"f": OLD}, [("f", IN, GUEST, True)]),
        (BOTH, {"f": OLD}, {"f": OLD}, []),
        (BOTH, {"f": NEW}, {"f": OLD}, [("f", IN, "", False)]),
        (BOTH, {"f": OLD}, {"f": NEW}, [("f", OUT, "", False)]),
        (BOTH, {"f": NEWER}, {"f": NEW}, [("f", IN, GUEST, True)]),
        (BOTH, {"f": NEW}, {"f": NEWER}, [("f", OUT, HOST, True)]),
        (BOTH, {"f": NEW, "g": OLD}, {"g": OLD}, [("f", IN, "", True), ("g", SETTLE, "", False)]),
        (BOTH, {"g": OLD}, {"f": NEW, "g": OLD}, [("f", OUT, "", True), ("g", SETTLE, "", False)]),
        ({**BOTH, "g": Pair(OLD, OLD)}, {"g": OLD}, {"f": OLD, "g": OLD}, [("f", IN, "", False)]),
        ({**BOTH, "g": Pair(OLD, OLD)}, {"f": OLD, "g": OLD}, {"g": OLD}, [("f", OUT, "", False)]),
        (None, {"f": FOLDER, "f/x": OLD}, {"f": NEW}, [("f", STUCK, "", True), ("f/x", STUCK, "", False)]),
        (None, {"f": Entry(LINK, target="a")}, {"f": Entry(LINK, target="b")}, [("f", IN, GUEST, True)]),
    ],
)
def test_the_table(before, host, guest, expected):
    assert one(before, host, guest)[0] == expected


def test_a_side_that_is_empty_as_a_whole_removes_nothing():
    assert one(BOTH, {}, {"f": OLD})[0] == [("f", OUT, "", False)]
    assert one(BOTH, {"f": OLD}, {})[0] == [("f", IN, "", False)]


def test_readonly_never_goes_out_and_keeps_what_the_machine_made_of_it():
    steps, kept = one(BOTH, {"f": OLD}, {"f": NEW}, readonly=True)
    assert (steps, kept) == ([], BOTH)
    assert one(BOTH, {"f": NEW}, {"f": NEWER}, readonly=True)[0] == [("f", IN, "", True)]
    assert one(None, {}, {"mine": OLD}, readonly=True) == ([], {})


def test_a_file_that_may_be_run_now_has_changed():
    assert one(BOTH, {"f": Entry(FILE, 3, 10 * S, 0o755)}, {"f": OLD})[0] == [("f", IN, "", False)]


def test_what_was_copied_in_is_known_again():
    host = Entry(FILE, 3, 10 * S + 999)
    assert same(host, copied_in(host))
    assert not same(host, Entry(FILE, 3, 11 * S))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e30])
def test_a_guests_time_that_is_none(seconds):
    assert time_ns(seconds) == 0


def test_names_and_links():
    assert [is_name(name) for name in ("a", "", "..", "a/b", "a\0", "x" * 256, "\udc80")] == [True, *[False] * 6]
    assert [leads_out("d/l", t) for t in ("x", "../x", "../../x", "/etc", "", "a/../../..")] == [
        False, False, True, True, True, True,
    ]  # fmt: skip


entries = st.builds(
    Entry, kind=st.sampled_from([FILE, DIR, LINK]), size=st.integers(0, 2),
    mtime_ns=st.integers(0, 2).map(lambda n: n * S), target=st.sampled_from(["", "t"]),
)  # fmt: skip
trees = st.dictionaries(st.sampled_from(["a", "b", "a/c", "d"]), entries, max_size=4)


@given(st.dictionaries(st.sampled_from(["a", "b", "a/c", "d"]), st.builds(Pair, entries, entries)), trees, trees)
def test_no_version_is_lost_unless_its_own_side_made_it_or_it_is_kept(before, host, guest):
    steps, _ = plan(before, host, guest, readonly=False)
    for step in steps:
        pair = before.get(step.path, Pair(None, None))
        if step.act == OUT and step.host is not None and step.host != pair.host and not same_side(step.host, pair.host):
            assert step.loser == HOST
        if step.act == IN and step.guest is not None and not same_side(step.guest, pair.guest):
            assert step.loser == GUEST


def same_side(now, before):
    if before is None or now.kind != before.kind:
        return False
    if now.kind == FILE:
        return (now.size, now.mtime_ns, now.runs) == (before.size, before.mtime_ns, before.runs)
    return now.kind == DIR or now.target == before.target
