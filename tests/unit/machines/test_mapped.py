"""A capture over what is at hand: the newer page wins, whether it is mapped or copied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recess.machines.contract import Capture, Fingerprint, MappedMemory, PageSet
from recess.machines.mapped import mapped_capture, mapped_over

NOTHING = PageSet(memoryview(b""), memoryview(b""))
EMPTY = Capture(NOTHING, NOTHING, b"", "template", Fingerprint("", "", "", "", (), "", ""), 0.0, 4096, 0)


def capture(pages: list[int], file: int) -> Capture:
    """A capture that lies in this "file": only the numbers count here."""
    numbers = np.array(pages, "<u4")
    memory = PageSet(memoryview(numbers.tobytes()), memoryview(bytes(4096 * len(pages))))
    return replace(EMPTY, memory=memory, memory_file=file)


def places(mapped: MappedMemory) -> dict[int, tuple[int, int]]:
    """Where each page's content is, as the driver lays it out: strays over runs."""
    out = {}
    for rows in (mapped.runs, mapped.strays):
        for first, count, number, at in np.frombuffer(rows, "<u4").reshape(-1, 4).tolist():
            out |= {first + n: (mapped.files[number], at + n) for n in range(count)}
    return out


@given(st.lists(st.sets(st.integers(0, 400), max_size=60), min_size=1, max_size=5))
def test_each_page_is_the_newest(layers: list[set[int]]) -> None:
    mapped, model = MappedMemory((), b""), {}
    for number, pages in enumerate(layers, start=100):
        over = mapped_over(mapped, capture(sorted(pages), number))
        assert over is not None
        mapped = over
        model |= {page: (number, at) for at, page in enumerate(sorted(pages))}
    assert places(mapped) == model


def test_too_many_files_or_pages_in_no_file_are_a_no() -> None:
    mapped = MappedMemory(tuple(range(16)), b"")
    assert mapped_over(mapped, capture([1], 99)) is None
    assert mapped_over(MappedMemory((), b""), capture([1], -1)) is None
    assert mapped_over(MappedMemory((), b""), EMPTY) is not None


def test_a_capture_alone_is_its_own_runs() -> None:
    mapped = mapped_capture(capture([3, 4, 9], 7))
    assert mapped is not None
    assert places(mapped) == {3: (7, 0), 4: (7, 1), 9: (7, 2)}
    assert mapped_capture(EMPTY) is None
