"""Memories kept in files: always the right bytes or none, whatever happened to the files, the process or the disk."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recess.errors import Corrupt
from recess.paging import Piece, mapform
from recess.paging.keptfile import KeptFile
from recess.paging.layout import Layout, in_file, put_over
from recess.paging.pagefiles import PageFiles
from recess.testing.crash import crashing

PAGE = 4096
TOTAL = 2400
GROUND = np.repeat(np.arange(TOTAL, dtype=np.uint32) % 251, PAGE // 4).view(np.uint8).reshape(TOTAL, PAGE)


def fill(pages, seed):
    """Pages that tell their number and their seed."""
    words = (np.asarray(pages, np.uint32) * 7919 + seed * 104729).astype(np.uint32)
    return np.repeat(words, PAGE // 4).view(np.uint8).reshape(-1, PAGE)


class Cache:
    """A cache and what it should say."""

    def __init__(self, folder, **options):
        self.folder = Path(folder)
        self.options = {"max_bytes": 1 << 30, "boot": "this", **options}
        self.files = PageFiles(self.folder, **self.options)
        self.memory = {}

    def reopen(self, **changes):
        self.files = PageFiles(self.folder, **{**self.options, **changes})

    def add(self, key, pages, seed, parent="", total=TOTAL):
        numbers = np.array(sorted(set(pages)), np.uint32)
        data = fill(numbers, seed)
        kept = self.files.add(key, "ground", total, numbers, data, lambda wanted: GROUND[wanted], parent=parent)
        if not parent or parent in self.memory:
            whole = dict(self.memory.get(parent, {}))
            whole.update(zip(numbers.tolist(), data, strict=True))
            self.memory[key] = whole
        return kept

    def read(self, key, ground="ground"):
        """All of a memory as its runs and strays make it, or None."""
        found = self.files.find(key, ground)
        if found is None:
            return None
        out = GROUND.copy()
        for rows in (found.runs, found.strays):
            for first, count, number, at in np.frombuffer(rows, "<u4").reshape(-1, 4).tolist():
                data = os.pread(found.files[number], count * PAGE, at * PAGE)
                out[first : first + count] = np.frombuffer(data, np.uint8).reshape(count, PAGE)
        return out

    def expected(self, key):
        out = GROUND.copy()
        for page, data in self.memory[key].items():
            out[page] = data
        return out

    def check(self, key):
        np.testing.assert_array_equal(self.read(key), self.expected(key))

    def names(self, suffix):
        return sorted(path.name for path in self.folder.iterdir() if path.suffix == suffix)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "pages")


def test_a_memory_is_there_again_and_a_child_writes_only_what_is_its_own(cache):
    assert cache.add("a", range(100, 400), 1)
    assert cache.add("b", [*range(150, 170), 900], 2, parent="a")
    assert cache.add("c", [], 3, parent="b")
    assert cache.files.used_bytes() == (300 + 21) * PAGE
    for key in "abc":
        cache.check(key)
    cache.reopen()
    for key in "abc":
        cache.check(key)


def test_small_gaps_are_filled_from_the_ground(cache):
    assert cache.add("a", [10, 11, 15, 100], 1)
    found = cache.files.find("a", "ground")
    assert len(found.runs) // 16 == 2
    cache.check("a")


def test_only_over_its_own_ground_and_parent(cache):
    assert cache.add("a", [1], 1)
    assert cache.read("a", ground="other") is None
    assert not cache.add("b", [2], 1, parent="nobody")
    assert not cache.add("b", [2], 1, parent="a", total=TOTAL - 1)
    cache.check("a")


def test_scattered_pages_become_strays_and_a_wasteful_line_is_written_anew(cache):
    assert cache.add("a", range(TOTAL), 1)
    assert cache.add("b", range(0, TOTAL, 2), 2, parent="a")  # would be 2400 mappings
    found = cache.files.find("b", "ground")
    assert (len(found.runs) // 16, np.frombuffer(found.strays, "<u4").reshape(-1, 4)[:, 1].sum()) == (1, TOTAL / 2)
    cache.check("b")
    key = "b"
    for number in range(20):
        assert cache.add(f"n{number}", range(number * 10, number * 10 + 100), number, parent=key)
        key = f"n{number}"
        if number % 5 == 4:
            cache.check(key)
        assert len(cache.files.find(key, "ground").files) <= 16


def nameless(cache, pages, seed, **limits):
    """What a pager writes down of these pages, in an order of its own."""
    numbers = np.array(sorted(pages), np.uint32)
    kept = KeptFile(cache.folder, numbers, **{"max_bytes": 1 << 30, "reserve_bytes": 0, **limits})
    for page in sorted(numbers.tolist(), key=lambda n: n % 7):
        kept.keep(Piece(page, fill([page], seed)))
    return numbers, kept


def test_what_somebody_else_wrote_down_is_taken_over(cache):
    numbers, kept = nameless(cache, [*range(10, 40), 50, 51], 1)
    assert cache.names(".pages") == []  # nothing has a name before it is whole
    assert cache.files.adopt("a", "ground", TOTAL, numbers, kept.fd)
    cache.memory["a"] = dict(zip(numbers.tolist(), fill(numbers, 1), strict=True))
    cache.check("a")
    assert not cache.files.adopt("a", "ground", TOTAL, numbers, kept.fd)
    assert cache.add("b", [11, 60], 2, parent="a")
    cache.reopen()
    cache.check("b")
    stamp = os.fstat(kept.fd).st_ctime_ns
    while os.fstat(kept.fd).st_ctime_ns == stamp:
        kept.keep(Piece(10, fill([10], 3)))
    assert cache.read("a") is None  # whoever writes to it later unseals it
    os.close(kept.fd)


def test_a_file_that_is_not_whole_is_not_taken_over(cache):
    numbers, kept = nameless(cache, range(9), 1)
    assert not cache.files.adopt("a", "ground", TOTAL, np.append(numbers, np.uint32(70)), kept.fd)
    assert cache.read("a") is None
    os.close(kept.fd)
    assert list(cache.folder.iterdir()) == []


def test_there_is_room_for_it_or_nothing_is_written_down(cache):
    for limits in ({"max_bytes": 8 * PAGE}, {"reserve_bytes": 1 << 60}):
        _, kept = nameless(cache, range(9), 1, **limits)
        assert kept.fd == -1
    assert (
        KeptFile(cache.folder / "nowhere", np.arange(3, dtype=np.uint32), max_bytes=1 << 30, reserve_bytes=0).fd == -1
    )


def test_a_server_that_stops_gives_up_what_it_writes_and_warns_of_nothing(cache, caplog):
    cache.files.close()
    assert not cache.add("a", range(100), 1)
    assert cache.names(".pages") == []
    assert caplog.records == []


def test_a_disk_that_fails_ends_the_keeping_only(cache):
    _, kept = nameless(cache, range(9), 1)
    os.close(kept.fd)
    kept.fd = os.open(cache.folder, os.O_RDONLY)  # nothing can be written to it
    closed = kept.fd
    kept.keep(Piece(1, fill([1], 1)))
    assert kept.fd == -1
    os.close(closed)


def change(path, how):
    """Change a file until the kernel's clock has gone on (its time stamps are as coarse as its tick)."""
    before = path.stat().st_ctime_ns
    path.chmod(0o600)
    while True:
        data = path.read_bytes()
        path.write_bytes(how(data))
        if path.stat().st_ctime_ns != before:
            path.chmod(0o400)
            return


@pytest.mark.parametrize(
    "how", [lambda d: bytes([d[0] ^ 1]) + d[1:], lambda d: d[:-1], lambda d: d + b"x", lambda d: b""]
)
@pytest.mark.parametrize("what", [".pages", ".map"])
def test_a_changed_cut_or_grown_file_is_never_served(cache, what, how):
    cache.add("a", range(50), 1)
    (name,) = cache.names(what)
    change(cache.folder / name, how)
    assert cache.read("a") is None
    assert cache.files.counts.refused == 1
    assert cache.read("a") is None  # gone for good, with its files
    assert cache.names(".pages") == cache.names(".map") == []
    assert cache.add("a", range(50), 1)  # and may come again
    cache.check("a")


def test_a_file_that_was_put_in_another_ones_place_is_not_served(cache):
    cache.add("a", range(50), 1)
    (name,) = cache.names(".pages")
    twin = cache.folder / "twin"
    twin.write_bytes((cache.folder / name).read_bytes())
    twin.replace(cache.folder / name)
    assert cache.read("a") is None


def test_a_missing_file_is_a_miss(cache):
    cache.add("a", range(50), 1)
    (cache.folder / cache.names(".pages")[0]).unlink()
    assert cache.read("a") is None


def test_damage_is_found_at_the_start_too(cache):
    cache.add("a", range(50), 1)
    cache.add("b", range(60), 1)
    change(cache.folder / "a.map", lambda data: data[:40])
    cache.reopen()
    assert not cache.files.has("a")
    assert len(cache.names(".pages")) == 1
    cache.check("b")


def test_another_boot_of_the_host_begins_anew(cache):
    cache.add("a", range(50), 1)
    cache.reopen(boot="next")
    assert cache.read("a") is None
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("point", ["pagefiles.data_written", "pagefiles.map_written"])
def test_a_crash_leaves_the_old_and_nothing_else(cache, point):
    cache.add("a", range(50), 1)
    with crashing(point):
        cache.add("b", range(20, 60), 2, parent="a")
    assert len(cache.names(".pages")) == 2  # nobody cleans up after a crash but the next start
    cache.reopen()
    cache.check("a")
    assert not cache.files.has("b")
    assert (len(cache.names(".pages")), cache.names(".map"), cache.names(".new")) == (1, ["a.map"], [])


def test_the_bound_lets_the_oldest_go_and_files_with_the_last_that_needs_them(tmp_path):
    cache = Cache(tmp_path / "pages", max_bytes=100 * PAGE)
    cache.add("a", range(40), 1)
    cache.add("b", range(100, 140), 1)
    cache.check("a")  # used: b is the oldest now
    assert cache.add("c", range(200, 240), 1)
    assert cache.read("b") is None
    cache.check("a")
    assert cache.add("d", range(5), 2, parent="a")
    cache.files.drop("a")
    cache.check("d")  # its parent's file stays as long as it is needed
    assert cache.files.used_bytes() == 85 * PAGE
    assert not cache.add("e", range(101), 1)
    cache.check("d")
    assert cache.files.give_back(1) == 40 * PAGE  # c, which was not used for longest
    cache.files.keep_only(["x"])
    assert cache.files.used_bytes() == 0
    assert list(cache.folder.iterdir()) == []


def test_a_full_disk_keeps_less(tmp_path):
    free = [200 * PAGE]
    cache = Cache(tmp_path / "pages", free_bytes=lambda: free[0], reserve_bytes=100 * PAGE)
    assert cache.add("a", range(50), 1)
    free[0] = 120 * PAGE
    assert not cache.add("b", range(50), 2)
    assert cache.files.used_bytes() == 0  # what was there was given back first


def test_what_is_mapped_outlives_its_entry(cache):
    cache.add("a", range(50), 1)
    found = cache.files.find("a", "ground")
    cache.files.drop("a")
    assert os.pread(found.files[0], PAGE, 0) == fill([0], 1).tobytes()
    fds = found.files
    del found
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fds[0])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_history_gives_the_right_bytes_or_none(tmp_path_factory, seed):
    chance = random.Random(seed)
    cache = Cache(tmp_path_factory.mktemp("pages") / "pages", max_bytes=chance.choice([1 << 30, 1800 * PAGE]))
    for number in range(6):
        keys = list(cache.memory)
        parent = chance.choice(keys) if keys and chance.random() < 0.7 else ""
        if chance.random() < 0.5:
            start = chance.randrange(TOTAL - 300)
            pages = range(start, start + chance.randrange(300), chance.choice([1, 1, 2, 7]))
        else:
            pages = chance.sample(range(TOTAL), chance.randrange(900))
        cache.add(f"k{number}", pages, number, parent=parent)
        if chance.random() < 0.2 and keys:
            cache.files.drop(chance.choice(keys))
        if chance.random() < 0.2:
            cache.reopen()
    for key in cache.memory:
        if cache.files.has(key):
            cache.check(key)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 300), max_size=80), st.booleans()), max_size=6))
def test_layers_over_layers_are_what_a_dictionary_says(layers):
    layout, model = Layout(), {}
    for number, (pages, calm) in enumerate(layers):
        numbers = np.array(sorted(pages), np.uint32)
        layout = put_over(in_file(numbers, number), layout, runs_calm=1000 if calm else 3)
        model |= {page: (number, at) for at, page in enumerate(numbers.tolist())}
    places = layout.all()
    got = dict(zip(places.pages.tolist(), zip(places.file.tolist(), places.at.tolist(), strict=True), strict=True))
    assert got == model
    kept = layout.files()
    again = layout.renumbered(kept).all()
    assert [kept[n] for n in again.file.tolist()] == places.file.tolist()


def test_a_map_that_lies_is_refused():
    file = mapform.Sealed("f.pages", 4, 1, 1)

    def build(runs, strays=()):
        rows = [np.array(r, "<u4").reshape(-1, 4) for r in (runs, strays)]
        return mapform.encode(mapform.Map("b", "g", 100, (file,), *rows))

    good = build([[0, 2, 0, 0], [2, 1, 0, 3]])
    assert mapform.decode(good).runs.tolist() == [[0, 2, 0, 0], [2, 1, 0, 3]]
    for runs in (
        [[0, 5, 0, 0]],  # longer than its file
        [[0, 1, 0, 4]],
        [[99, 2, 0, 0]],  # beyond the memory
        [[0, 1, 1, 0]],  # a file that is not there
        [[0, 0, 0, 0]],
        [[5, 2, 0, 0], [6, 1, 0, 0]],
    ):
        with pytest.raises(Corrupt):
            mapform.decode(build(runs))
        with pytest.raises(Corrupt):
            mapform.decode(build([], runs))
    for cut in (0, 7, 39, 44, len(good) - 1):
        with pytest.raises(Corrupt):
            mapform.decode(good[:cut])
