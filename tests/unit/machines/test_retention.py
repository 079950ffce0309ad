"""The policy: what goes, what stays, what goes first."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from recess.machines.retention import Candidate, Keeping, beyond_last, missing_bytes, no_room, prunable

DAY = 86400.0
POLICY = Keeping(keep_last=2, retention_s=DAY)
NOW = 100 * DAY


def candidate(number, *, age=10 * DAY, **more):
    base = Candidate(f"snp_{number}", "ses_1", NOW - age - number, True, False, False, False, True)
    return replace(base, **more)


def ids(doomed):
    return [int(one.id[4:]) for one in doomed]


def test_the_newest_of_each_series_stay_and_the_oldest_go_first():
    found = [candidate(n) for n in range(5)] + [candidate(9, series="mch_1")]
    assert ids(prunable(found, now=NOW, keeping=POLICY)) == [4, 3, 2]


def test_needed_named_and_recent_ones_stay():
    found = [
        candidate(0), candidate(1), candidate(2, needed=True), candidate(3, named=True), candidate(4, wanted=True),
        candidate(5, automatic=False), candidate(6, age=DAY / 2), candidate(7),
    ]  # fmt: skip
    assert ids(prunable(found, now=NOW, keeping=POLICY)) == [7, 1]  # 6 and 0 are the newest
    assert ids(prunable(found, now=NOW, keeping=POLICY, pressed=True)) == [7, 4, 1]
    assert ids(prunable(found, now=NOW, keeping=POLICY, everything=True)) == [7, 5, 1]


def test_a_time_to_live_ends_named_ones_but_never_what_is_needed():
    found = [
        candidate(0, named=True, automatic=False, expires=NOW), candidate(1, named=True, expires=NOW + 1),
        candidate(2, needed=True, expires=NOW - 1),
    ]  # fmt: skip
    assert [(d.id, d.why) for d in prunable(found, now=NOW, keeping=POLICY)] == [("snp_0", "its time to live is over")]


def test_nothing_but_the_retention_keeps_what_is_left_of_something_gone():
    found = [candidate(0, series_alive=False), candidate(1, series_alive=False, age=DAY / 2)]
    assert ids(prunable(found, now=NOW, keeping=POLICY)) == [0]


def test_beyond_the_last():
    found = [candidate(n, automatic=False) for n in range(5)]
    found[3] = replace(found[3], needed=True)
    found[1] = replace(found[1], named=True)
    assert ids(beyond_last(found, "ses_1", 1)) == [4, 2]
    assert beyond_last(found, "other", 1) == []


def test_room():
    policy = Keeping(quota_bytes=100, reserve_bytes=50)
    assert missing_bytes(policy, used=90, free=60) == 0
    assert missing_bytes(policy, used=130, free=60) == 30
    assert missing_bytes(policy, used=130, free=10) == 40
    assert missing_bytes(Keeping(reserve_bytes=0), used=1 << 60, free=0) == 0
    assert missing_bytes(policy, used=0, free=None) == 0
    assert "quota" in no_room(policy, used=130, free=60)
    assert "reserve" in no_room(policy, used=1, free=10)


flags = st.booleans()
candidates = st.lists(
    st.builds(
        Candidate, st.uuids().map(str), st.sampled_from(["a", "b"]), st.floats(0, NOW), flags, flags, flags, flags,
        flags, st.sampled_from([0.0, NOW - 1, NOW + 1]),
    ),
    max_size=12,
)  # fmt: skip


@given(candidates, flags, flags)
def test_what_never_happens(found, everything, pressed):
    doomed = {one.id for one in prunable(found, now=NOW, keeping=POLICY, everything=everything, pressed=pressed)}
    by_id = {one.id: one for one in found}
    for ref in doomed:
        one = by_id[ref]
        assert not one.needed
        assert not one.named or one.expires
        assert one.automatic or everything or one.expires
        assert pressed or one.expires or not one.wanted
    if pressed:
        assert doomed >= {one.id for one in prunable(found, now=NOW, keeping=POLICY, everything=everything)}
    for series in "ab":
        alive = [c for c in found if c.series == series and c.series_alive and not c.named and not c.expires]
        alive = [c for c in alive if c.automatic or everything]
        kept = [c for c in alive if c.id not in doomed]
        assert len(kept) >= min(len(alive), POLICY.keep_last) or any(c.expires or not c.series_alive for c in found)
