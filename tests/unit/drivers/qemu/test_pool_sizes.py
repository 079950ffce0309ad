"""How many VMs wait: demand, its age, and the bounds."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from recess.drivers.qemu.pool_sizes import BURST_S, HALF_S, KEEP_S, MEMORY_SHARE, Facts, burst, wanted
from recess.units import GIB, MIB

NOW = 10_000.0


def facts(starts: dict[str, list[float]], *, limit: int = 4, free: int = 8 * GIB, each: int = 30 * MIB) -> Facts[str]:
    return Facts(NOW, starts, limit, free, each)


def test_nobody_asked() -> None:
    assert wanted(facts({})) == {}
    assert wanted(facts({"a": []})) == {}


def test_one_start_keeps_one_waiting_for_a_while() -> None:
    assert burst([NOW], NOW) == 1
    assert burst([NOW - KEEP_S + 1], NOW) == 1
    assert burst([NOW - KEEP_S], NOW) == 0


def test_a_burst_keeps_as_many_and_fewer_as_it_ages() -> None:
    together = [NOW - 0.3, NOW - 0.2, NOW - 0.1, NOW]
    assert burst(together, NOW) == 4
    assert burst(together, NOW + HALF_S) == 2
    assert burst(together, NOW + 3 * HALF_S) == 1
    assert burst(together, NOW + KEEP_S) == 0


def test_starts_apart_are_no_burst() -> None:
    assert burst([NOW - 3 * k * BURST_S for k in range(5, -1, -1)], NOW) == 1


def test_each_kind_has_one_before_any_has_two() -> None:
    busy = {"old": [NOW - 60] * 4, "new": [NOW] * 4}
    assert wanted(facts(busy, limit=3)) == {"new": 2, "old": 1}
    assert wanted(facts(busy, limit=1)) == {"new": 1}
    assert wanted(facts(busy, limit=0)) == {}


def test_memory_bounds_them() -> None:
    busy = {"a": [NOW] * 4}
    assert wanted(facts(busy, free=int(2 * 30 * MIB / MEMORY_SHARE), each=30 * MIB)) == {"a": 2}
    assert wanted(facts(busy, free=0)) == {}
    assert wanted(facts(busy, each=0)) == {"a": 4}


times = st.lists(st.floats(0, NOW), max_size=8).map(sorted)


@given(st.dictionaries(st.text(max_size=2), times, max_size=5), st.integers(0, 9), st.integers(0, 1 << 33))
def test_bounds_hold_and_only_what_was_asked_for_waits(starts: dict[str, list[float]], limit: int, free: int) -> None:
    sizes = wanted(facts(starts, limit=limit, free=free))
    total = sum(sizes.values())
    assert total <= limit
    assert total * 30 * MIB <= math.ceil(free * MEMORY_SHARE)
    for kind, count in sizes.items():
        assert 1 <= count <= len(starts[kind])
        assert starts[kind][-1] > NOW - KEEP_S
    # who waits longest for another start is the first to have none
    without = [kind for kind in starts if kind not in sizes and burst(starts[kind], NOW)]
    assert all(starts[w][-1] <= starts[s][-1] for w in without for s in sizes)
