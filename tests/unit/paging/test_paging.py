"""Pages on demand, on a real userfaultfd of this very process; the book and the choice as pure functions."""

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.errors import Corrupt
from recess.paging import Facts, FaultServer, Piece, Segment, Uffd, choose, make_book
from recess.paging import server as server_module
from recess.paging.book import bridged, gaps_of, number_groups, pairs, runs_of
from recess.paging.uffd import ProcessGone

PAGE = 4096
PAGES = 64
PER_GROUP = 4
USERFAULTFD, USER_ONLY = 323, 1
API, REGISTER = 0xC018AA3F, 0xC020AA00


class Memory:
    """Anonymous memory of this process whose pages wait for a handler."""

    def __init__(self):
        self.map = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array = np.frombuffer(self.map, np.uint8).reshape(PAGES, PAGE)
        self.address = self.array.ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | USER_ONLY)
        assert self.fd >= 0, os.strerror(ctypes.get_errno())
        fcntl.ioctl(self.fd, API, bytearray(struct.pack("<QQQ", 0xAA, 0, 0)))
        fcntl.ioctl(self.fd, REGISTER, bytearray(struct.pack("<QQQQ", self.address, PAGES * PAGE, 1, 0)))

    def uffd(self):
        # two segments that lie the other way round in memory than in the guest
        half = PAGES // 2
        low, high = Segment(self.address, half, half), Segment(self.address + half * PAGE, 0, half)
        return Uffd(self.fd, [low, high], protect=False)

    def guest(self):
        """The memory in the guest's order. Touching it faults."""
        return np.concatenate((self.array[PAGES // 2 :], self.array[: PAGES // 2]))

    def first_byte(self, page):
        """Touch a page. By a foreign function: it lets go of the interpreter's lock, which the handler needs."""
        byte = ctypes.create_string_buffer(1)
        ctypes.memmove(byte, self.address + (page + PAGES // 2) % PAGES * PAGE, 1)
        return byte.raw[0]

    def close(self):
        os.close(self.fd)


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.close()


class Library:
    def __init__(self, bad=None):
        self.bad = bad
        self.fetched = []
        self.ahead = []
        self.lock = threading.Lock()

    def prefetch(self, groups):
        self.ahead.append(list(groups))

    def fetch(self, group):
        if group == self.bad:
            raise Corrupt("frame does not match its hash", blob="lyr_x")
        with self.lock:
            self.fetched.append(group)
        first = group * PER_GROUP
        return [Piece(first, content(first, PER_GROUP))], 100


def content(first, count):
    pages = np.zeros((count, PAGE), np.uint8)
    pages[:] = (np.arange(first, first + count) + 1)[:, None]
    return pages


def whole_book():
    pages = np.arange(PAGES, dtype=np.uint32)
    return make_book(pages, (pages // PER_GROUP).astype(np.int32), PAGES // PER_GROUP)


def test_a_touched_page_is_brought_first_and_the_rest_behind(memory):
    library = Library()
    server = FaultServer(memory.uffd(), whole_book(), library, fill_after_s=0.3)
    done = threading.Thread(target=server.run)
    done.start()
    assert memory.first_byte(50) == 51
    assert memory.first_byte(3) == 4
    assert memory.first_byte(49) == 50  # of the same group: it is there already
    done.join(20)
    assert not done.is_alive()
    assert library.fetched[:2] == [12, 0]
    assert sorted(library.fetched) == list(range(PAGES // PER_GROUP))  # each once
    assert (memory.guest() == content(0, PAGES)).all()
    report = server.report
    assert (report.touched, report.faults, report.fault_bytes) == ([12, 0], 2, 200)
    assert (report.groups, report.bytes_read) == (16, 1600)
    assert 0 < report.first_s < report.filled_s


def test_many_touch_at_once_while_it_fills(memory):
    server = FaultServer(memory.uffd(), whole_book(), Library(), fill_after_s=0.0)
    found = {}

    def touch(numbers):
        for number in numbers:
            found[number] = memory.first_byte(number)

    threads = [threading.Thread(target=touch, args=(range(start, PAGES, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    server.run()
    for thread in threads:
        thread.join(20)
    assert found == {number: number + 1 for number in range(PAGES)}


def test_what_is_wanted_first_comes_first(memory):
    library = Library()
    FaultServer(memory.uffd(), whole_book(), library, fill_after_s=0.0, first=[9, 2]).run()
    assert library.fetched[:2] == [9, 2]
    assert len(library.fetched) == 16


def test_a_damaged_group_ends_it_and_nothing_is_made_up(memory):
    library = Library(bad=7)
    with pytest.raises(Corrupt):
        FaultServer(memory.uffd(), whole_book(), library, fill_after_s=0.0).run()
    assert 7 not in library.fetched


def test_pages_that_are_there_already_stay(memory):
    uffd = memory.uffd()
    uffd.put(4, content(90, 1))
    uffd.put(2, content(2, 4))
    assert [memory.first_byte(page) for page in (2, 3, 4, 5)] == [3, 4, 91, 6]


@given(st.sets(st.integers(0, 300)), st.integers(1, 20), st.integers(1, 40))
def test_gaps_join_runs_and_bound_their_number(numbers, gap_max, runs_max):
    pages = np.array(sorted(numbers), np.uint32)
    gaps = gaps_of(pages, gap_max=gap_max, runs_max=runs_max)
    assert not numbers & set(gaps.tolist())
    joined = np.union1d(pages, gaps).astype(np.uint32)
    assert len(runs_of(joined)[0]) <= max(runs_max, 1)
    book = make_book(joined, np.zeros(len(joined), np.int32), 1)
    listed = [
        p for first, count in np.frombuffer(book.ranges(), "<u4").reshape(-1, 2) for p in range(first, first + count)
    ]
    assert listed == joined.tolist()
    between, *runs = bridged(pages, gap_max=gap_max, runs_max=runs_max)
    assert between.tolist() == gaps.tolist()
    assert pairs(*runs) == book.ranges()  # told before there is a book
    assert all(book.group_of(page) == 0 for page in listed)
    assert book.group_of(301) is None


FACTS = Facts(pages=1 << 18, over_template=True, driver_can=True, pager_there=True)


@pytest.mark.parametrize(
    ("facts", "way", "word"),
    [
        (FACTS, "lazy", "1024 MiB"),
        (replace(FACTS, pages=100), "inject", "only"),
        (replace(FACTS, pages=100, wanted="lazy"), "lazy", "configuration"),
        (replace(FACTS, wanted="inject"), "inject", "configuration"),
        (replace(FACTS, driver_can=False), "inject", "driver"),
        (replace(FACTS, pager_there=False), "inject", "pager"),
        (replace(FACTS, over_template=False, wanted="lazy"), "inject", "template"),
    ],
)
def test_how_memory_is_brought_back(facts, way, word):
    choice = choose(facts)
    assert choice.way == way
    assert word in choice.why


class GoesAway:
    """The descriptor of a process that ends while its memory is being brought."""

    def __init__(self, after):
        self.fd, self.other = os.pipe()
        self.left = after

    def put(self, first, data):
        if self.left == 0:
            raise ProcessGone
        self.left -= 1


class Stuck(Library):
    """One whose store does not answer."""

    def __init__(self):
        super().__init__()
        self.asked, self.go_on = threading.Event(), threading.Event()

    def fetch(self, group):
        self.asked.set()
        self.go_on.wait()
        return super().fetch(group)


def test_it_ends_with_the_process_whose_memory_it_is_though_the_store_does_not_answer(memory, monkeypatch):
    monkeypatch.setattr(server_module, "_STUCK_S", 0.05)
    library = Stuck()
    with subprocess.Popen(["sleep", "600"]) as owner:
        pidfd = os.pidfd_open(owner.pid)
        server = FaultServer(memory.uffd(), whole_book(), library, fill_after_s=0.0, owner=pidfd)
        done = threading.Thread(target=server.run)
        done.start()
        assert library.asked.wait(20)
        assert done.is_alive()
        owner.kill()
        done.join(20)
    assert not done.is_alive()
    assert server.report.groups == 0
    library.go_on.set()  # late: what it brings now is nobody's
    for thread in threading.enumerate():
        if thread.name == "fill":
            thread.join(20)
    os.close(server._wake_read)
    os.close(server._wake_write)
    os.close(pidfd)


def test_a_process_that_ends_meanwhile_is_no_error_but_not_everything_came():
    gone, kept = GoesAway(3), []
    library = Library()
    pages = np.arange(PAGES, dtype=np.uint32)
    book = make_book(pages, (pages // PER_GROUP).astype(np.int32), PAGES // PER_GROUP)
    server = FaultServer(gone, book, library, fill_after_s=0.0, keep=kept.append)
    report = server.run()
    assert (report.groups, book.groups) == (3, 16)
    assert [piece.first for piece in kept] == [0, 4, 8]
    assert library.ahead[0] == list(range(16))
    os.close(gone.fd)
    os.close(gone.other)


@given(st.lists(st.tuples(st.integers(-3, 6), st.integers(1, 5)), max_size=20))
def test_groups_are_numbered_by_their_first_page(stretches):
    keys = np.repeat(np.array([key for key, _ in stretches], np.int64), [count for _, count in stretches])
    numbers, count = number_groups(keys)
    known: dict[int, int] = {}
    assert numbers.tolist() == [known.setdefault(key, len(known)) for key in keys.tolist()]
    assert count == len(known)
