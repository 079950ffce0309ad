"""The ledger of a VM's memory: against a model, over any order of captures, commits, failures and restarts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recess.drivers.firecracker import ledger
from recess.drivers.firecracker.calls import DIFF, FULL, RAM_FILE
from recess.drivers.firecracker.ledger import ALL, DELTA, Ledger, Plan
from recess.errors import DriverFailed
from recess.units import PAGE_BYTES

PAGES = 24


def page(value: int) -> bytes:
    return bytes([value]) * PAGE_BYTES


class Guest:
    """A memory with Firecracker's list of changes, and the files that its captures would write."""

    def __init__(self, run: Path, template: Path, over: dict[int, int]) -> None:
        self.run, self.template = run, template
        self.now = {n: data for n in range(PAGES) if (data := self._template_page(n)) != page(0)}
        self.now |= {n: page(value) for n, value in over.items()}
        self.changed: set[int] = set()
        if over:
            (run / RAM_FILE).parent.mkdir()
            with (run / RAM_FILE).open("wb") as handle:
                handle.truncate(PAGES * PAGE_BYTES)
                for n in range(PAGES):
                    if n in self.now:
                        os.pwrite(handle.fileno(), self.now[n], n * PAGE_BYTES)

    def _template_page(self, number: int) -> bytes:
        with self.template.open("rb") as handle:
            return os.pread(handle.fileno(), PAGE_BYTES, number * PAGE_BYTES)

    def write(self, number: int, value: int) -> None:
        self.now[number] = page(value)
        self.changed.add(number)

    def take(self, kind: str) -> Path:
        taken = self.run / "taken"
        with taken.open("wb") as handle:
            handle.truncate(PAGES * PAGE_BYTES)
            for n in self.changed if kind == DIFF else range(PAGES):
                os.pwrite(handle.fileno(), self.now.get(n, page(0)), n * PAGE_BYTES)
        self.changed = set()
        return taken

    def differing(self) -> dict[int, bytes]:
        return {n: data for n in range(PAGES) if (data := self.now.get(n, page(0))) != self._template_page(n)}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template"
    path.write_bytes(b"".join(page(n + 1 if n < 8 else 0) for n in range(PAGES)))
    return path


def content(run: Path, numbers: ledger.Numbers) -> dict[int, bytes]:
    packed = ledger.collect(run, numbers)
    data = bytes(packed.pages.data)
    found = np.frombuffer(packed.pages.indices, "<u4").tolist()
    packed.close()
    return {n: data[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i, n in enumerate(found)}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, PAGES - 1), st.integers(0, 255)),
        st.tuples(st.just("capture"), st.booleans(), st.booleans()),
        st.tuples(st.just("fail"), st.booleans(), st.booleans()),
        st.tuples(st.just("restart"), st.none(), st.none()),
        st.tuples(st.just("absorb"), st.none(), st.none()),
        st.tuples(st.just("late"), st.none(), st.none()),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=STEPS, over=st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 255), max_size=6), whole=st.booleans()
)
def test_what_a_capture_gives_rebuilds_the_memory(
    tmp_path_factory: pytest.TempPathFactory, template: Path, steps: list[tuple[str, int, int]],
    over: dict[int, int], whole: bool,
) -> None:  # fmt: skip
    """A whole one over the template, a delta over the snapshot that it counts from."""
    run = tmp_path_factory.mktemp("run")
    guest = Guest(run, template, over)
    known = Ledger("snp_0", over=np.array(sorted(over), np.uint32), whole=whole)
    ledger.write_ledger(run, known)
    last = dict(guest.differing())
    stored = {"snp_0": last}
    for number, (what, one, two) in enumerate(steps, start=1):
        if what == "write":
            guest.write(one, two)
        elif what == "restart":
            known = ledger.read_ledger(run)
        elif what == "absorb":
            poisoned = ledger.is_poisoned(run)
            ledger.poison(run)
            taken = guest.take(DIFF)
            if poisoned:
                taken.unlink()
            else:
                known = ledger.absorb(run, known, taken)
        elif what == "late":
            known = ledger.committed(known, known.generation, f"snp_{number}")
            ledger.write_ledger(run, known)
            stored[f"snp_{number}"] = last
        elif what == "fail":  # Firecracker may have written, or not; nobody takes it
            ledger.poison(run)
            if one:
                guest.take(DIFF)
        else:
            plan = ledger.plan_capture(known, known.base if one else "", poisoned=ledger.is_poisoned(run))
            ledger.poison(run)
            known, numbers = ledger.enter(run, known, plan, guest.take(plan.kind), template)
            given_out = content(run, numbers)
            last = wanted = guest.differing()
            below = stored[plan.parent] if plan.parent else {}
            together = {**below, **given_out}
            rebuilt = {n: together.get(n, guest._template_page(n)) for n in range(PAGES)}
            assert rebuilt == {n: guest.now.get(n, page(0)) for n in range(PAGES)}
            assert not ledger.is_poisoned(run)
            assert not (run / "taken").exists()
            if two:
                known = ledger.committed(known, known.generation, f"snp_{number}")
                ledger.write_ledger(run, known)
                stored[f"snp_{number}"] = wanted
            assert not plan.parent or set(given_out) <= set(numbers.tolist())


def test_a_plan_says_what_to_ask_for() -> None:
    known = Ledger(base="snp_a")
    assert ledger.plan_capture(known, "snp_a", poisoned=False) == Plan(DIFF, DELTA, "snp_a")
    assert ledger.plan_capture(known, "snp_b", poisoned=False) == Plan(DIFF, ALL)
    assert ledger.plan_capture(Ledger(), "", poisoned=False) == Plan(DIFF, ALL)
    assert ledger.plan_capture(known, "snp_a", poisoned=True) == Plan(FULL, ALL)
    brought = replace(known, whole=False)
    assert ledger.plan_capture(brought, "", poisoned=False) == Plan(FULL, ALL)
    assert ledger.plan_capture(brought, "snp_a", poisoned=False) == Plan(DIFF, DELTA, "snp_a")


def test_a_word_that_comes_too_late_changes_nothing() -> None:
    known = Ledger(base="snp_a", generation=2, since=np.array([3], np.uint32))
    assert ledger.committed(known, 1, "snp_b") is known
    after = ledger.committed(known, 2, "snp_b")
    assert (after.base, len(after.since)) == ("snp_b", 0)


@pytest.mark.parametrize(
    "data", [b"", b"\xc0", b"\x96\x02\xa0\x00\xc3\xc4\x00\xc4\x00", b"\x96\x01\xa0\x00\xc3\xc4\x03abc\xc4\x00"]
)
def test_a_ledger_that_cannot_be_read_is_a_typed_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ledger.LEDGER_FILE).write_bytes(data)
    with pytest.raises(DriverFailed):
        ledger.read_ledger(tmp_path)


def test_the_record_comes_back(tmp_path: Path) -> None:
    known = Ledger("snp_a", 7, np.array([1, 5], np.uint32), np.array([9], np.uint32), False, np.array([2], np.uint32))
    ledger.write_ledger(tmp_path, known)
    back = ledger.read_ledger(tmp_path)
    assert (back.base, back.generation, back.whole) == ("snp_a", 7, False)
    assert (back.since.tolist(), back.over.tolist(), back.fresh.tolist()) == ([1, 5], [9], [2])
