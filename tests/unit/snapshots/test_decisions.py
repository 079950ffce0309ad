"""The pure decisions: what is equal, what is rewritten, what may be restored, what a key is."""

import numpy as np
import pytest

from recess.errors import BadInput
from recess.frames import WorkPool
from recess.snapshots import can_restore
from recess.snapshots.classify import IS_BASE, IS_ZERO, against_base, fingerprints, first_equal, look_up, take
from recess.snapshots.keys import digest_of, id_of, is_id, key_of
from recess.snapshots.rewrite import (
    BUDGET_PAGES_MIN,
    LIVE_FRACTION_LATE,
    Usage,
    budget_of,
    joins,
    late_rewrites,
    rewrites,
    worth_comparing,
)
from tests.unit.snapshots.helpers import pages

H = "0" * 64


@pytest.fixture(scope="module")
def pool():
    pool = WorkPool()
    yield pool
    pool.close()


def test_against_zeros(pool):
    assert against_base(pages(0, 1, 0), np.arange(3, dtype=np.uint32), None, pool).tolist() == [IS_BASE, 0, IS_BASE]


def test_against_a_template(pool):
    template = pages(1, 2, 0, 3)
    kinds = against_base(pages(1, 0, 0, 9), np.array([0, 1, 2, 3], np.uint32), template, pool)
    assert kinds.tolist() == [IS_BASE, IS_ZERO, IS_BASE, 0]


def test_what_is_known_to_be_zeros_is_not_read(pool):
    """Of the rows said to be zeros not even the data is looked at, and of the template only what may be other than zeros."""
    template = pages(5, 5, 0, 0, 7)
    template.flags.writeable = False
    data, numbers = pages(9, 9, 9, 9, 7), np.arange(5, dtype=np.uint32)
    zeros = np.array([True, True, True, True, False])
    held = np.array([0, 4], np.uint32)  # 1 is left out though it is none: it is not looked at
    kinds = against_base(data, numbers, template, pool, zeros=zeros, held=held)
    assert kinds.tolist() == [IS_ZERO, IS_BASE, IS_BASE, IS_BASE, IS_BASE]
    assert against_base(data, numbers, template, pool, zeros=zeros).tolist() == [IS_ZERO] * 2 + [IS_BASE] * 3
    assert against_base(data, numbers, None, pool, zeros=zeros).tolist() == [IS_BASE] * 4 + [0]
    mixed = pages(0, 5, 0, 6, 7)  # only of 0 and 4 the template is looked at; the rest is compared with zeros
    assert against_base(mixed, numbers, template, pool, held=held).tolist() == [IS_ZERO, 0, IS_BASE, 0, IS_BASE]


def test_many_batches(pool):
    data = pages(*(n % 3 for n in range(1000)))
    kinds = against_base(data, np.arange(1000, dtype=np.uint32), None, pool)
    assert kinds.tolist() == [IS_BASE if n % 3 == 0 else 0 for n in range(1000)]
    found = look_up(data, np.arange(0, 1000, 2), lambda part: (part[:, 4088] == 2).astype(np.int64) - 1, pool)
    assert found.tolist() == [0 if n % 3 == 2 else -1 for n in range(0, 1000, 2)]


def test_first_equal_across_parts(pool):
    one, two = pages(1, 2, 1, 3), pages(3, 4, 2)
    rows = (one, np.array([0, 1, 2, 3])), (two, np.array([0, 2]))
    assert first_equal(rows, pool).tolist() == [0, 1, 0, 3, 3, 1]
    assert first_equal([], pool).tolist() == []
    assert first_equal([(pages(), np.empty(0, np.int64))], pool).tolist() == []


def test_colliding_fingerprints_are_told_apart(pool, monkeypatch):
    monkeypatch.setattr("recess.snapshots.classify._KEYS", np.zeros(512, np.uint64))
    data = pages(1, 2, 1, 2, 1)
    assert len(set(fingerprints(data, np.arange(5), pool).tolist())) == 1
    assert first_equal([(data, np.arange(5))], pool).tolist() == [0, 1, 0, 3, 0]  # 3 is only compared with 0


def test_take_copies_only_scattered_rows():
    data = pages(1, 2, 3)
    assert np.shares_memory(take(data, np.array([1, 2])), data)
    assert np.array_equal(take(data, np.array([0, 2])), pages(1, 3))
    assert len(take(data, np.empty(0, np.int64))) == 0


PLENTY = 10**9


def test_half_dead_files_are_rewritten():
    usages = [Usage("a", 49, 100), Usage("b", 50, 100), Usage("c", 100, 100)]
    assert rewrites(usages, budget=PLENTY) == {"a": 49}


def test_the_smallest_go_when_there_are_too_many():
    usages = [Usage(f"f{n}", n, n) for n in range(1, 11)]
    assert rewrites(usages, budget=PLENTY, files_max=8) == {"f1": 1, "f2": 2, "f3": 3}
    assert rewrites(usages, budget=PLENTY, files_max=1) == {usage.id: usage.live for usage in usages}
    assert rewrites([], budget=PLENTY) == {}


def test_files_of_a_size_go_together_so_that_the_next_snapshots_rewrite_nothing():
    usages = [Usage(f"f{n:02}", 100 + n, 100 + n) for n in range(15)] + [Usage("old", 900, 900)]
    assert rewrites(usages[1:], budget=PLENTY) == {}
    assert rewrites(usages, budget=PLENTY) == {usage.id: usage.live for usage in usages[:15]}


class Layers:
    """Which layer each page of a disk is in, by the real rules and nothing else."""

    def __init__(self, total):
        self.owner, self.entries, self.written = np.zeros(total, np.int64), {0: total}, 0

    def usages(self):
        live = np.bincount(self.owner, minlength=max(self.entries) + 1)
        return [Usage(f"{n:04}", int(live[n]), size) for n, size in self.entries.items() if live[n]]

    def move(self, moves, number):
        """Move what a rule says into the layer of this number, which holds its own pages by now."""
        for ref, count in moves.items():
            self.owner[np.flatnonzero(self.owner == int(ref))[:count]] = number
        self.entries = {n: size for n, size in self.entries.items() if (self.owner == n).any()}
        self.entries[number] = int((self.owner == number).sum())
        self.written += self.entries[number]


def test_a_long_life_of_small_snapshots_writes_little_more_than_is_new():
    new, layers, rng = 64, Layers(40_000), np.random.default_rng(1)
    for number in range(1, 241):
        layers.owner[rng.choice(40_000, new, replace=False)] = number
        layers.move(rewrites(layers.usages(), budget=budget_of(new)), number)
    assert len(layers.entries) <= 16
    assert layers.written <= 4 * 240 * new  # rewriting only what is too many, each time again: 10 times


@pytest.mark.parametrize(("new", "total"), [(64, 40_000), (1024, 98_304), (2560, 98_304)])
def test_joining_writes_little_more_than_is_new_whatever_the_size(new, total):
    layers, rng = Layers(total), np.random.default_rng(1)
    for number in range(1, 241):
        layers.owner[rng.choice(total, new, replace=False)] = 2 * number
        before = {usage.id: usage.live for usage in layers.usages()}
        layers.move(late_rewrites(layers.usages(), before, new_pages=new), 2 * number)
        assert len(layers.entries) <= 16
        assert all(usage.live >= LIVE_FRACTION_LATE * usage.entries for usage in layers.usages())
        if moves := joins(layers.usages()):
            layers.move(moves, 2 * number + 1)
    assert layers.written <= 4 * 240 * new


def test_of_too_many_layers_the_smaller_half_is_joined_and_what_costs_little_beside_it():
    small = [Usage(f"f{n:02}", 100 + n, 100 + n) for n in range(9)]
    larger = [Usage("g0", 400, 400), Usage("g1", 600, 600), *(Usage(f"h{n}", 9000, 9000) for n in range(5))]
    assert joins([*small, *larger[1:]]) == {}
    found = joins([*small, *larger])
    assert found == {usage.id: usage.live for usage in [*small, *larger[:2]]}
    assert joins([*small, *larger], pages_max=250) == {"f00": 100, "f01": 101}
    assert joins([*small, *larger], pages_max=150) == {}  # one in the place of one


def test_a_snapshot_rewrites_only_what_there_was_no_time_to_join():
    half, late = Usage("a", 40, 100), Usage("b", 20, 100)
    before = {"a": 45, "b": 45}
    assert late_rewrites([half, late], before, new_pages=0) == {"b": 20}
    assert late_rewrites([half, late], {"a": 45, "b": 100}, new_pages=0) == {}  # it was not sparse before this snapshot
    assert late_rewrites([half, late], {"a": 45, "b": 100}, new_pages=1280) == {"b": 20}  # next to nothing
    assert late_rewrites([half, late], {"a": 45, "b": 100}, new_pages=1279) == {}
    many = [Usage(f"f{n:02}", 100 + n, 200) for n in range(24)]
    before = {usage.id: 200 for usage in many}
    assert late_rewrites(many[:23], before, new_pages=0) == {}
    assert late_rewrites(many, before, new_pages=0).keys() == {usage.id for usage in many}  # all of one size


def test_a_mostly_dead_layer_is_joined_if_it_is_worth_a_file():
    assert joins([Usage("a", 499, 1000), Usage("b", 500, 1000)]) == {"a": 499}
    assert joins([Usage("b", 500, 1000), Usage("c", 10, 100)]) == {}
    assert joins([Usage("a", 400, 1000), Usage("b", 30, 1000)], pages_max=100) == {"b": 30, "a": 70}
    assert joins([]) == {}
    along = [Usage("a", 400, 1000), Usage("b", 100, 100), Usage("c", 150, 150), Usage("d", 200, 200)]
    assert joins(along) == {"a": 400, "b": 100, "c": 150}  # a file is made in any case


def test_a_large_file_is_emptied_a_piece_at_a_time():
    usages = [Usage("large", 40_000, 100_000), Usage("small", 10, 100), Usage("full", 5, 5)]
    assert rewrites(usages, budget=1000) == {"small": 10, "large": 990}
    assert rewrites(usages, budget=0) == {}


def test_beyond_a_hard_limit_the_smallest_go_whatever_they_cost():
    usages = [Usage(f"f{n:02}", 1000 + n, 1000 + n) for n in range(30)]
    assert rewrites(usages, budget=1500) == {f"f{n:02}": 1000 + n for n in range(7)}  # 23 and the new one are left
    assert rewrites(usages[:20], budget=500) == {}  # over the soft limit only, and none of them fits
    assert rewrites(usages[:20], budget=2500) == {"f00": 1000, "f01": 1001}


def test_a_budget_grows_with_what_is_new():
    assert budget_of(0) == BUDGET_PAGES_MIN
    assert budget_of(100_000) == 200_000


NODE = {
    "driver": "qemu", "driver_version": "7.2.9", "accelerator": "tcg", "cpu_model": "qemu64", "cpu_flags": ["a", "b"],
    "machine_type": "microvm", "kernel_hash": H,
}  # fmt: skip


def test_the_same_node_can_restore():
    assert can_restore(NODE, NODE) == []
    assert can_restore(NODE, NODE | {"cpu_flags": ["c", "b", "a"]}) == []
    assert can_restore(NODE, NODE | {"cpu_flags": ("a", "b")}) == []


@pytest.mark.parametrize("field", [f for f in NODE if f != "cpu_flags"])
def test_each_difference_is_a_reason(field):
    reasons = can_restore(NODE, NODE | {field: "other"})
    assert len(reasons) == 1
    assert "other" in reasons[0]
    assert len(can_restore({k: v for k, v in NODE.items() if k != field}, NODE)) == 1


def test_missing_flags_are_named():
    assert can_restore(NODE, NODE | {"cpu_flags": ["a"]}) == ["this CPU lacks b"]
    many = NODE | {"cpu_flags": [f"f{n:02}" for n in range(20)]}
    assert can_restore(many, NODE)[0].endswith("f07 and 12 more")


def test_keys():
    assert key_of(f"lyr_{H}") == f"layers/lyr_{H}"
    assert id_of(key_of(f"snp_{H}")) == f"snp_{H}"
    assert id_of(f"layers/snp_{H}") is None
    assert id_of("layers/other") is None
    assert is_id(f"snp_{H}", "snp")
    assert not is_id(f"snp_{H}", "lyr")
    for bad in ("", "snp_", f"snp_{H}0", f"SNP_{H}", f"xxx_{H}", f"snp_{H}\n"):
        with pytest.raises(BadInput):
            digest_of(bad)


def test_scattered_pages_of_a_tracked_machine_are_not_compared():
    assert worth_comparing(1, 1, inherits=False)
    assert not worth_comparing(7, 1, inherits=True)
    assert worth_comparing(16, 1, inherits=True)
    assert worth_comparing(0, 0, inherits=True)
