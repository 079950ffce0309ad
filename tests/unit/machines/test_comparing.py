"""Pages, listings and process tables against brute force and by example."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.errors import BadInput, NotFound
from recess.guestlink.link import FileStat
from recess.machines.comparing import (
    PageDiff,
    compare_files,
    compare_pages,
    compare_processes,
    look_at,
    parse_process,
)
from recess.machines.contract import PageSet
from recess.machines.looking import judge

TOTAL = 9


def page_set(content):
    rows = sorted(content)
    data = np.concatenate([np.full(4096, content[n], np.uint8) for n in rows] or [np.empty(0, np.uint8)])
    return PageSet(memoryview(np.array(rows, "<u4").tobytes()), memoryview(data.tobytes()))


def base_of(content):
    return None if content is None else np.repeat(np.array(content, np.uint8)[:, None], 4096, axis=1)


sides = st.dictionaries(st.integers(0, TOTAL - 1), st.integers(0, 3), max_size=TOTAL)
bases = st.none() | st.lists(st.integers(0, 3), min_size=TOTAL, max_size=TOTAL)


@given(sides, sides, bases, bases, st.booleans())
def test_pages_are_compared_as_whole_memories(left, right, one, two, same):
    first = base_of(one)
    second = first if same else base_of(two)
    below = one if same else two
    mine = [left.get(n, one[n] if one else 0) for n in range(TOTAL)]
    theirs = [right.get(n, below[n] if below else 0) for n in range(TOTAL)]
    changed = [n for n in range(TOTAL) if mine[n] != theirs[n]]
    found = compare_pages(page_set(left), page_set(right), first, second, TOTAL)
    assert found == PageDiff(
        TOTAL, len(left.keys() | right.keys()), len(changed), sum(theirs[n] == 0 for n in changed),
        sum(theirs[n] == (below[n] if below else 0) for n in changed),
    )  # fmt: skip


def stat(path, kind="file", size=1, mode=0o644, mtime=1.0):
    return FileStat(path, kind, size, mode, mtime)


def test_files():
    left = {f.path: f for f in (stat("/a"), stat("/b"), stat("/c"), stat("/d", "dir"), stat("/e", "dir"), stat("/f"))}
    right = {
        **left, "/b": stat("/b", size=2), "/c": stat("/c", mode=0o755), "/d": stat("/d", "dir", 9, mtime=9.0),
        "/e": stat("/e"), "/f": stat("/f", mtime=2.0), "/new": stat("/new"),
    }  # fmt: skip
    del right["/a"]
    found = compare_files(left, right)
    assert (found.added, found.removed, found.changed) == (["/new"], ["/a"], ["/b", "/c", "/e", "/f"])


def test_processes_are_known_by_number_and_start():
    left = {(1, "0"): "init", (7, "50"): "sleep 9", (8, "50"): "sh"}
    right = {(1, "0"): "init", (7, "99"): "sleep 9", (8, "50"): "python x"}
    found = compare_processes(left, right)
    assert (found.added, found.removed, found.changed) == (["7 sleep 9"], ["7 sleep 9"], ["8 python x"])


def test_the_kernels_words_about_a_process():
    stat_line = b"42 (a) b) (c) S 1 42 42 0 -1 4194560 104 0 0 0 0 0 0 0 20 0 1 0 8734 2500000 200\n"
    assert parse_process(42, stat_line, b"sh\0-c\0sleep 1\0") == ((42, "8734"), "sh -c sleep 1")
    assert parse_process(42, stat_line, b"") is None  # a kernel thread
    for rubbish in (b"", b"42", b"42 (x", b"42 (x) S 1"):
        assert parse_process(42, rubbish, b"x") is None


def test_what_a_broken_restore_looks_like():
    good = PageDiff(100_000, 8_000, 200, 100, 110)
    assert judge(good, good) == ""
    assert "memory" in judge(replace(good, changed=600), good)
    assert "template's" in judge(replace(good, reverted=120), good)
    assert "disk" in judge(good, replace(good, changed=8_000))
    assert judge(replace(good, listed=100_000, changed=1_900), good) == ""


class LyingGuest:
    """A guest whose listings go round in circles, leave their folder and never end."""

    def __init__(self, endless):
        self.endless = endless
        self.asked = 0

    async def list_dir(self, path):
        self.asked += 1
        if path == "/proc":
            raise NotFound("no /proc")
        rows = [stat("/", "dir"), stat("/etc", "dir"), stat("/elsewhere/x", "dir"), stat(path + "x/../y", "dir")]
        if self.endless:
            rows += [stat(f"{path.rstrip('/')}/{n}", "dir") for n in range(10_000)]
        return rows

    async def jobs(self):
        return []


async def test_a_guest_that_lies_cannot_keep_us_walking():
    found = await look_at(LyingGuest(endless=False))
    assert set(found.files) == {"/etc"}
    guest = LyingGuest(endless=True)
    with pytest.raises(BadInput, match="too many"):
        await look_at(guest)
    assert guest.asked < 200
