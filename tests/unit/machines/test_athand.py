"""Which memories are kept at hand, without a machine: captures as files, what waits, what is given up."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from recess.machines import athand
from recess.machines.athand import AtHand, ground
from recess.machines.contract import Capture, Fingerprint, MappedMemory, PageSet, TemplateRef
from recess.paging.pagefiles import PageFiles
from recess.units import PAGE_BYTES

TOTAL = 256
NOTHING = PageSet(memoryview(b""), memoryview(b""))
PRINT = Fingerprint("fake", "1", "none", "m", (), "t", "k")


@pytest.fixture
def template(tmp_path: Path) -> TemplateRef:
    ram = tmp_path / "ram"
    with ram.open("wb") as file:
        file.truncate(TOTAL * PAGE_BYTES)
        os.pwrite(file.fileno(), b"\7" * PAGE_BYTES, 3 * PAGE_BYTES)
    return TemplateRef("tpl", ram, tmp_path / "disk", tmp_path / "vmstate")


@pytest.fixture
def hand(tmp_path: Path):
    made = AtHand(PageFiles(tmp_path / "pages", max_bytes=1 << 30))
    yield made
    made.close()


def capture(pages: list[int], byte: int, *, parent: str = "", base: str = "template") -> Capture:
    """A capture whose pages lie in a file, as the QEMU driver's do."""
    numbers = np.array(pages, "<u4")
    data = np.full((len(pages), PAGE_BYTES), byte, np.uint8)
    data[:, 0] = numbers % 251
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, data.tobytes() + numbers.tobytes())
    memory = PageSet(memoryview(numbers.tobytes()), memoryview(data.tobytes()))
    return Capture(
        memory, NOTHING, b"", base, PRINT, 0.0, TOTAL, 0, parent=parent, memory_file=fd, resources=[File(fd)]
    )


class File:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


def content(mapped: MappedMemory | None) -> dict[int, bytes]:
    assert mapped is not None
    out = {}
    for rows in (mapped.runs, mapped.strays):
        for first, count, number, at in np.frombuffer(rows, "<u4").reshape(-1, 4).tolist():
            for n in range(count):
                out[first + n] = os.pread(mapped.files[number], 2, (at + n) * PAGE_BYTES)
    return out


async def test_captures_are_kept_with_what_they_count_from(hand: AtHand, template: TemplateRef) -> None:
    for snapshot, one in (("a", capture([1, 2, 5], 8)), ("b", capture([2, 9], 9, parent="a"))):
        hand.keep_capture(snapshot, template, one)
        one.close()  # its file is needed no more
    await hand.settled()
    assert content(hand.find("a", template)) == {
        1: b"\1\10", 2: b"\2\10", 3: b"\7\7", 4: b"\0\0", 5: b"\5\10"
    }  # fmt: skip
    found = content(hand.find("b", template))
    assert {page: found[page] for page in (1, 2, 9)} == {1: b"\1\10", 2: b"\2\11", 9: b"\11\11"}
    hand.drop("a")
    await hand.settled()
    assert hand.find("a", template) is None
    assert hand.find("b", template) is not None


async def test_what_cannot_be_mapped_is_not_kept(hand: AtHand, template: TemplateRef) -> None:
    for one, over in (
        (capture([1], 1, base="boot"), template),
        (capture([1], 1), None),
        (capture([1], 1, parent="nobody"), template),
    ):
        hand.keep_capture("a", over, one)
        one.close()
    await hand.settled()
    assert hand.find("a", template) is None


async def test_pages_that_were_read_are_kept_once(hand: AtHand, template: TemplateRef) -> None:
    one = capture([4, 6], 3)
    for _ in range(2):
        hand.keep_pages("a", template, one.memory, TOTAL)
        await hand.settled()
    one.close()
    assert content(hand.find("a", template))[6] == b"\6\3"
    assert hand.about()["bytes"] == 3 * PAGE_BYTES


async def test_beyond_a_bound_nothing_waits_in_memory(
    hand: AtHand, template: TemplateRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(athand, "WAITING_BYTES_MAX", 3 * PAGE_BYTES)
    busy, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        go_on.wait()

    hand._later(wait, lambda: None, 0)
    busy.wait()
    captures = {name: capture([1, 2], 1) for name in "abc"}
    for name, one in captures.items():
        hand.keep_capture(name, template, one)
        one.close()
    go_on.set()
    await hand.settled()
    assert [hand.find(name, template) is not None for name in "abc"] == [True, False, False]


async def test_a_server_that_stops_waits_for_nothing(hand: AtHand, template: TemplateRef) -> None:
    one = capture([1, 2], 1)
    hand.close()
    hand.keep_capture("a", template, one)  # too late: nothing is left open
    one.close()
    hand.close()
    assert hand.find("a", template) is None


def test_what_is_written_when_it_stops_is_given_up(tmp_path: Path) -> None:
    files = PageFiles(tmp_path / "pages", max_bytes=1 << 30)
    files.close()
    pages = np.arange(3, dtype=np.uint32)
    assert not files.add("a", "g", TOTAL, pages, np.ones((3, PAGE_BYTES), np.uint8), ground(tmp_path / "no"))
    assert list((tmp_path / "pages").iterdir()) == []


def test_the_ground_is_read_without_filling_its_holes(template: TemplateRef) -> None:
    before = template.ram.stat().st_blocks
    pages = ground(template.ram)(np.array([0, 3, 4, 200], np.uint32))
    assert pages[:, 0].tolist() == [0, 7, 0, 0]
    assert template.ram.stat().st_blocks == before
