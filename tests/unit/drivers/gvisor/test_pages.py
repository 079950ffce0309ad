"""A checkpoint's pages get numbers that last, and come back in their order, whatever was given."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.drivers.gvisor import pages
from recess.drivers.gvisor.pages import META, OBJECTS, PAGES, Known
from recess.errors import Corrupt, OutOfSpace
from recess.machines.contract import PageSet

TOTAL = 16
NONE = PageSet(memoryview(b""), memoryview(b""))


def content(*kinds: int) -> np.ndarray:
    """Pages by kind: 0 is zeros, equal kinds are equal pages."""
    out = np.zeros((len(kinds), 4096), np.uint8)
    for row, kind in enumerate(kinds):
        out[row, kind % 4096] = kind % 255 + 1 if kind else 0
    return out


def checkpoint(folder, memory, *, objects=b"objects", meta=b"meta"):
    folder.mkdir(exist_ok=True)
    (folder / PAGES).write_bytes(memory.tobytes())
    (folder / OBJECTS).write_bytes(objects)
    (folder / META).write_bytes(meta)
    return folder


kinds = st.lists(st.integers(0, 9), max_size=30)


@settings(max_examples=80, deadline=None)
@given(first=kinds, second=kinds, third=kinds)
def test_every_generation_comes_back(tmp_path_factory, first, second, third):
    """Template, a capture over it, a restore of that, a capture of what was restored: byte for byte, zeros included."""
    folder = tmp_path_factory.mktemp("c")
    base = np.zeros((TOTAL, 4096), np.uint8)
    made = pages.assign(content(*first), Known(), TOTAL)
    base[made.numbers[made.rows]] = content(*first)[made.rows]
    known = made.known
    for number, generation in enumerate((second, third)):
        memory = content(*generation)
        assigned = pages.assign(memory, known, TOTAL)
        differing = pages.differing(memory, assigned, base)
        index = np.frombuffer(differing.indices, "<u4")
        assert bool((np.diff(index.astype(np.int64)) > 0).all())
        state = pages.pack_state(checkpoint(folder / f"made{number}", memory), assigned.numbers)
        back = folder / f"back{number}"
        known = pages.unpack(back, state, differing, base, TOTAL)
        assert (back / PAGES).read_bytes() == memory.tobytes()
        assert ((back / OBJECTS).read_bytes(), (back / META).read_bytes()) == (b"objects", b"meta")


def test_a_page_keeps_its_number_however_far_it_moves():
    before = content(1, 2, 3, 4)
    first = pages.assign(before, Known(), TOTAL)
    numbers = first.numbers
    moved = content(9, 4, 0, 3, 2, 8, 1)
    second = pages.assign(moved, first.known, TOTAL)
    after = second.numbers
    assert [after[i] for i in (6, 4, 3, 1)] == list(numbers)
    assert after[2] == pages.ZERO
    assert not {after[0], after[5]} & set(numbers)
    base = np.zeros((TOTAL, 4096), np.uint8)
    base[numbers] = before
    assert pages.differing(moved, second, base).count == 2


def test_equal_pages_share_a_number():
    made = pages.assign(content(5, 5, 0, 5), Known(), TOTAL)
    assert len({*made.numbers[[0, 1, 3]]}) == 1
    assert len(made.rows) == 1


def test_pages_that_collide_are_not_taken_for_one_another(monkeypatch):
    monkeypatch.setattr(pages, "fingerprints", lambda data, rows, pool: np.zeros(len(rows), np.uint64))
    first = pages.assign(content(1, 2, 3), Known(), TOTAL)
    assert len({*first.numbers}) == 3
    second = pages.assign(content(4, 5, 6), first.known, TOTAL)
    assert len({*second.numbers}) == 3
    assert len(second.rows) == 3


def test_more_pages_than_the_machine_has_are_refused():
    with pytest.raises(OutOfSpace, match="the machine has"):
        pages.assign(content(*range(1, TOTAL + 2)), Known(), TOTAL)


def test_so_are_very_many_pages_though_they_are_few_different_ones():
    most = pages.assign(content(*[0, 1] * 2 * TOTAL), Known(), TOTAL)
    assert len(most.numbers) == 4 * TOTAL
    with pytest.raises(OutOfSpace, match="the machine has"):
        pages.assign(content(*[0, 1] * 2 * TOTAL, 1), Known(), TOTAL)


def good_state() -> bytes:
    return struct.pack("<4sIII", b"RGV1", 2, 1, 1) + struct.pack("<II", 3, pages.ZERO) + b"om"


def test_a_good_state_is_read():
    numbers, objects, meta = pages.unpack_state(good_state(), TOTAL)
    assert (list(numbers), bytes(objects), bytes(meta)) == ([3, pages.ZERO], b"o", b"m")


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\0" * 64,
        good_state()[:-1],
        good_state() + b"x",
        good_state().replace(b"RGV1", b"RGV2"),
        struct.pack("<4sIII", b"RGV1", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        struct.pack("<4sIII", b"RGV1", 1, 0, 0) + struct.pack("<I", TOTAL),
        struct.pack("<4sIII", b"RGV1", 4 * TOTAL + 1, 0, 0) + bytes(4 * (4 * TOTAL + 1)),
    ],
)
def test_a_state_that_lies_is_corrupt(state):
    with pytest.raises(Corrupt):
        pages.unpack_state(state, TOTAL)


def test_memory_that_does_not_fit_is_corrupt(tmp_path):
    beyond = PageSet(memoryview(struct.pack("<I", TOTAL)), memoryview(bytes(4096)))
    with pytest.raises(Corrupt):
        pages.unpack(tmp_path / "c", good_state(), beyond, None, TOTAL)
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_that_was_cut_is_corrupt(tmp_path):
    (tmp_path / PAGES).write_bytes(b"x" * 5000)
    with pytest.raises(Corrupt):
        pages.load(tmp_path)


def test_what_is_known_is_kept_for_the_next_server(tmp_path):
    made = pages.assign(content(1, 2, 0, 3), Known(), TOTAL)
    made.known.save(tmp_path / "known.npz")
    back = Known.load(tmp_path / "known.npz")
    assert (list(back.prints), list(back.numbers)) == (list(made.known.prints), list(made.known.numbers))
    for damaged in (b"", b"x" * 100, (tmp_path / "known.npz").read_bytes()[:-30]):
        (tmp_path / "known.npz").write_bytes(damaged)
        assert len(Known.load(tmp_path / "known.npz").prints) == 0
    assert len(Known.load(tmp_path / "absent").prints) == 0
