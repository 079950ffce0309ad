"""Old layers are joined beside the snapshots: what is stored stays right and bounded, whatever becomes of the joining."""

import random

import numpy as np
import pytest

from recess.blobs import LocalBlobs
from recess.errors import OutOfSpace
from recess.snapshots import SnapshotMeta, Store, joining
from recess.snapshots.contract import RawPart
from recess.snapshots.joining import Joined, moved, rest_s, select
from recess.snapshots.keys import LAYER, digest_of, make_id
from recess.snapshots.manifest_v1 import FileV1
from recess.snapshots.pagemap import KIND_LAYER, ZERO, PageMap, Source
from recess.snapshots.rewrite import FILES_HARD_MAX, FILES_MAX, LIVE_FRACTION_LATE, LIVE_FRACTION_MIN
from recess.testing.crash import crashing, known_crash_points
from tests.unit.snapshots.helpers import Blobs, page, raw
from tests.unit.snapshots.test_store import read

TOTAL = 4000
FIRST = {n: n + 1 for n in range(400)}


class Line:
    """One machine's line of snapshots, and what its memory and disk should hold."""

    def __init__(self, store):
        self.store = store
        self.rng = random.Random(5)
        self.number = 1000
        self.memory, self.disk = dict(FIRST), {7: 1}
        parts = [raw("memory", TOTAL, self.memory), raw("disk0", 50, self.disk)]
        self.last = store.write(parts, b"vm", _meta(0)).snapshot_id

    def go_on(self, pages=20, first=0, store=None):
        """Change some pages and take a snapshot; return its report."""
        self.number += 100
        places = self.rng.sample(range(first, 400), pages)
        change = {place: self.number + n for n, place in enumerate(places)}
        disk = {self.number % 50: change[places[0]]}  # a page that is in both
        parts = [_delta(raw("memory", TOTAL, change)), _delta(raw("disk0", 50, disk))]
        report = (store or self.store).write(parts, b"vm", _meta(self.number), parent_id=self.last)
        self.last = report.snapshot_id
        self.memory |= change
        self.disk |= disk
        return report

    def check(self, store=None):
        """Compare the newest snapshot with what it should hold, all of it verified."""
        store = store or self.store
        store.verify(self.last)
        for name, content in (("memory", self.memory), ("disk0", self.disk)):
            assert read(store, self.last, name, template=None) == {n: page(v).tobytes() for n, v in content.items()}

    def layers(self):
        return self.store.manifest(self.last)["layers"]


def _delta(part):
    return RawPart(part.name, part.pages_total, part.indices, part.data, inherits=True)


def _meta(number):
    return SnapshotMeta(fingerprint={}, spec={}, created=float(number))


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def store(blobs):
    store = Store(blobs)
    yield store
    store.close()


@pytest.fixture
def eager(monkeypatch):
    """Have layers joined for a few dead pages: real ones would be megabytes."""
    monkeypatch.setattr("recess.snapshots.rewrite.JOIN_DEAD_MIN", 1)


def make_joined(line):
    """Go on until something has been joined that no snapshot names yet; return the keys of it."""
    for _ in range(3 * FILES_MAX):
        line.go_on()
        line.store.settle()
        named = {file["id"] for file in line.layers()}
        ready = [info.key for info in line.store.blobs.list_blobs("layers/")]
        new = [key for key in ready if key.rpartition("/")[2] not in named and line.store._pins._held[key]]
        if new:
            return new
    raise AssertionError("nothing was ever joined")


def test_a_snapshot_writes_its_own_pages_only_and_what_it_refers_to_stays_bounded(store, eager):
    line = Line(store)
    joined = 0
    for number in range(100):
        report = line.go_on()
        assert report.pages_new == 20
        layers = line.layers()
        joined += sum(file["id"] in store.manifest(line.last)["made"] for file in layers) - 1
        assert len(layers) <= FILES_MAX
        assert all(file["live"] >= LIVE_FRACTION_LATE * file["entries"] for file in layers)
        store.settle()
        if number % 20 == 0:
            line.check()
    line.check()
    assert joined > 5
    assert sum(file["entries"] for file in line.layers()) <= 450 / LIVE_FRACTION_MIN + 2 * 20


def test_what_is_joined_is_counted_once_as_the_snapshots_own(store, blobs):
    line = Line(store)
    (key,) = make_joined(line)
    size = blobs.stat(key).size_bytes
    before = store.used_bytes()
    report = line.go_on()
    assert key.rpartition("/")[2] in store.manifest(line.last)["made"]
    assert report.new_bytes == store.used_bytes() - before + size
    line.go_on()
    assert key.rpartition("/")[2] not in store.manifest(line.last)["made"]
    assert not store._pins._held
    line.check()


def test_while_there_is_no_time_to_join_the_hard_bounds_hold(store):
    line = Line(store)
    with store._joiner.standing_still():
        for _ in range(60):
            line.go_on(pages=12)
            assert len(line.layers()) <= FILES_HARD_MAX
            assert all(file["live"] >= LIVE_FRACTION_LATE * file["entries"] for file in line.layers())
        line.check()
        assert len(line.layers()) > FILES_MAX
    store.settle()
    line.go_on()
    line.check()


def test_a_process_for_each_snapshot_rewrites_as_it_goes(blobs, store):
    line = Line(store)
    for _ in range(40):
        own = Store(blobs)
        line.go_on(store=own)
        own.close()
        assert len(line.layers()) <= FILES_MAX
        assert all(file["live"] >= LIVE_FRACTION_MIN * file["entries"] for file in line.layers())
    line.check()


POINTS = known_crash_points("joining.")


def test_there_are_points_of_each_step():
    assert POINTS == ["joining.before_file", "joining.held", "joining.named", "joining.stored", "joining.window"]


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_in_the_middle_leaves_the_snapshots_and_what_a_sweep_takes(tmp_path, point):
    blobs = LocalBlobs(tmp_path)
    store = Store(blobs)
    line = Line(store)
    with crashing(point):
        for _ in range(2 * FILES_MAX):
            with store._joiner.standing_still():  # it has not ended before somebody waits for it
                line.go_on()
                waiting = [end for _, end in store._joiner._jobs.values()]
            for end in waiting:
                end.result()
    store.close()
    line.store = after = Store(blobs)
    line.check()
    for ref in after.list_ids():
        after.verify(ref)  # one that nobody knows of is whole as well
    after.collect([line.last], grace_s=0.0, now=4e9)
    manifest = after.manifest(line.last)
    named = {file["id"] for kind in ("layers", "pagemaps") for file in manifest[kind]}
    named |= {line.last, manifest["vmstate"]["id"]}
    assert {info.key.rpartition("/")[2] for info in blobs.list_blobs()} == named
    assert list((tmp_path / ".tmp").iterdir()) == []
    for _ in range(FILES_MAX):
        line.go_on()
        after.settle()
    line.check()
    after.close()


class Watched(Blobs):
    """Notes what each draft is told, in order: bytes written, 0 for a flush. `full`: no more is taken."""

    def __init__(self):
        super().__init__()
        self.told = []
        self.full = False

    def draft(self):
        self.told.append([])
        return Noting(self, self.told[-1])


class Noting:
    def __init__(self, blobs, told):
        self.blobs, self.told, self.pieces = blobs, told, []

    def write(self, data):
        if self.blobs.full and len(self.told) > 5:
            raise OutOfSpace("a test's")
        self.told.append(len(data))
        self.pieces.append(bytes(data))

    def flush(self):
        self.told.append(0)

    def put(self, key):
        return self.blobs.put(key, self.pieces)

    def drop(self):
        self.pieces = []


def test_little_of_a_joined_layer_is_on_its_way_to_the_disk_at_once(monkeypatch, eager):
    """What else is fsynced would wait for it. The last of it is on the disk before the fsync."""
    monkeypatch.setattr(joining, "_FLUSH_BYTES", 30_000)
    monkeypatch.setattr(joining, "_WINDOW_PAGES", 16)
    blobs = Watched()
    store = Store(blobs, frame_bytes=4096)
    line = Line(store)
    for _ in range(FILES_MAX + 4):
        line.go_on(pages=60)
        store.settle()
    joined = [told for told in blobs.told if 0 in told]
    assert joined
    for told in joined:
        assert told[-1] == 0
        on_its_way = 0
        for size in told:
            on_its_way = on_its_way + size if size else 0
            assert on_its_way < 30_000 + max(told)  # a frame, or the index at its end
    assert max(told.count(0) for told in joined) > 4  # there was something to cut
    line.check()
    store.close()


def test_a_disk_that_fails_in_the_middle_costs_what_was_joined(eager):
    blobs = Watched()
    store = Store(blobs, frame_bytes=4096)
    line = Line(store)
    while not blobs.full:
        with store.giving_way():  # it has not ended before the disk is full
            line.go_on(pages=30)
            blobs.full = bool(store._joiner._jobs)
        store.settle()
    assert 0 < len(blobs.told[-1]) <= 6
    assert not store._joiner._ready
    assert not store._pins._held
    blobs.full = False
    line.go_on()
    line.check()
    store.close()


@pytest.mark.parametrize(("busy_s", "expected"), [(0.0, 0.0), (0.25, 0.25), (30.0, 2.0)])
def test_the_disk_is_left_to_others_for_half_of_the_time(busy_s, expected):
    assert rest_s(busy_s) == expected


def test_what_was_joined_and_is_gone_is_not_referred_to(store, blobs):
    line = Line(store)
    (key,) = make_joined(line)
    blobs.delete(key)
    line.go_on()
    line.check()
    assert key not in store._pins._held


def test_a_sweep_takes_what_was_joined_for_nobody(store, blobs):
    line = Line(store)
    (key,) = make_joined(line)
    store.collect([line.last], grace_s=3600.0, now=blobs.stat(key).modified_s)
    assert blobs.exists(key)  # young, and held
    store.discard(line.last)
    store.collect([], grace_s=-3600.0, now=blobs.stat(key).modified_s)
    assert not blobs.exists(key)
    assert not store._pins._held


def test_a_damaged_layer_is_left_for_the_restore_to_tell(store, blobs):
    line = Line(store)
    for _ in range(FILES_MAX - 2):
        line.go_on()
    store.settle()
    smallest = min(line.layers(), key=lambda file: file["live"])
    key = f"layers/{smallest['id']}"
    content = bytearray(blobs.get(key, max_bytes=1 << 30))
    content[10] ^= 1
    blobs.replace(key, bytes(content))
    for _ in range(3):
        line.go_on()
        store.settle()
    assert smallest["id"] in {file["id"] for file in line.layers()}
    assert not store._pins._held


def test_two_children_of_one_parent_are_both_right(store):
    line = Line(store)
    make_joined(line)
    parent, memory, disk = line.last, dict(line.memory), dict(line.disk)
    line.go_on()
    line.check()
    line.last, line.memory, line.disk = parent, memory, disk
    line.go_on()
    line.check()


def test_of_a_layer_too_large_the_beginning_goes():
    layer, other = Source(KIND_LAYER, b"a" * 32), Source(KIND_LAYER, b"b" * 32)
    ref = make_id(LAYER, layer.digest.hex())
    memory = _map([(0, layer, 5), (1, layer, 9), (2, other, 1), (3, layer, 2), (4, None, 0)])
    disk = _map([(8, layer, 9), (9, layer, 5)])
    found = select({"memory": memory, "disk0": disk}, [FileV1(ref, 1, 12, 3)], {ref: 2})
    assert [(name, pages.tolist()) for name, pages in found.owners] == [("disk0", [9]), ("memory", [3])]
    assert found.content.position.tolist() == [5, 2]
    slots, places = found.moves[layer]
    assert (slots.tolist(), places.tolist()) == ([2, 5], [1, 0])
    new = Joined("", FileV1(make_id(LAYER, "c" * 64), 1, 2, 2), found.moves)
    after = moved(memory, [new])
    rows = {source: after.pages[rows].tolist() for source, rows in after.rows_by_source().items()}
    assert rows == {new.source: [0, 3], layer: [1], other: [2], None: [4]}
    assert after.position.tolist() == [0, 9, 1, 1, 0]
    assert digest_of(new.file.id) == new.source.digest.hex()


def _map(rows):
    sources = tuple(sorted({source for _, source, _ in rows if source is not None}))
    number = [ZERO if source is None else 1 + sources.index(source) for _, source, _ in rows]
    pages, positions = ([row[i] for row in rows] for i in (0, 2))
    return PageMap(
        TOTAL, np.array(pages, np.uint32), np.array(number, np.int32), np.array(positions, np.uint32), sources
    )
