"""The snapshot store against a model: a snapshot is a dict of parts, a part an array of pages."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recess.blobs import MemoryBlobs
from recess.snapshots import RawPart, SnapshotMeta, Store
from tests.unit.snapshots.helpers import ArrayTemplate, FileSource, page

META = SnapshotMeta(fingerprint={"driver": "fake"}, spec={"memory": 1})
PAGES = {"memory": 1100, "disk0": 600}  # three leaves and two
BLOCKS = FileSource([page(n) for n in range(100, 108)])

contents = st.one_of(st.just(0), st.integers(1, 12), st.integers(100, 107), st.integers(0, 1 << 30))
numbers = st.one_of(st.integers(0, 20), st.integers(505, 520), st.integers(0, 1099))
changes = st.dictionaries(numbers, contents, max_size=30)
stretch = st.tuples(numbers, st.integers(1, 40), contents)
steps = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.sampled_from(["alone", "parent", "inherit", "inherit memory"]),
        changes,
        stretch,
        changes,
        st.binary(max_size=40),
    ),
    min_size=1,
    max_size=9,
)


def blank():
    return {name: np.zeros(count, np.int64) for name, count in PAGES.items()}


def apply(parts, memory, run, disk):
    parts = {name: content.copy() for name, content in parts.items()}
    for where, what in memory.items():
        parts["memory"][where] = what
    start, count, first = run
    for i in range(start, min(start + count, PAGES["memory"])):
        parts["memory"][i] = first + i if first else 0
    for where, what in disk.items():
        if where < PAGES["disk0"]:
            parts["disk0"][where] = what
    return parts


def capture(parts, base, extra):
    """What a driver hands over: all that may differ from the base, and some pages that do not."""
    out = []
    for name, content in parts.items():
        which = content != base[name]
        which[list(extra)] = True
        rows = np.flatnonzero(which).astype(np.uint32)
        out.append(part_of(name, content, rows))
    return out


def part_of(name, content, rows, *, inherits=False):
    """These pages; of some it is known that they are zeros, and then nobody looks at what is said to be in them."""
    known, data = (content[rows] == 0) & (rows % 2 == 0), pages_of(content[rows])
    data[known] = 0xEE
    return RawPart(name, len(content), rows, data, inherits, known)


def delta(parts, before):
    """What a driver with dirty tracking hands over: what may differ from the parent; its disk is told against the base."""
    out = []
    for name, content in parts.items():
        rows = np.flatnonzero(content != before[name]).astype(np.uint32)
        out.append(part_of(name, content, rows, inherits=True))
    return out


def pages_of(content):
    return np.stack([page(int(n)) for n in content]) if len(content) else np.empty((0, 4096), np.uint8)


def check(store, ref, parts, base, template, vmstate):
    for name, content in parts.items():
        overlay = store.overlay(ref, name, template=template, sources=[BLOCKS])
        differ = np.flatnonzero(content != base[name])
        assert overlay.indices.tolist() == differ.tolist()
        assert np.array_equal(overlay.data, pages_of(content[differ]))
    assert store.vmstate(ref) == vmstate


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    steps=steps,
    over_template=st.booleans(),
    frame_pages=st.sampled_from([1, 3, 16]),
    extra=st.sets(numbers.filter(lambda n: n < 600), max_size=5),
)
def test_any_history_reads_back(tmp_path_factory, steps, over_template, frame_pages, extra):
    blobs = MemoryBlobs()
    store = Store(blobs, frame_bytes=frame_pages * 4096, threads=2)
    base, template = blank(), None
    if over_template:
        booted = apply(blank(), {3: 5, 7: 100, 510: 77, 511: 78, 512: 79}, (600, 30, 1000), {1: 9, 599: 4})
        ref = store.write(capture(booted, base, extra), b"boot", META, sources=[BLOCKS]).snapshot_id
        check(store, ref, booted, base, None, b"boot")
        base = booted
        template = ArrayTemplate(ref, {name: pages_of(content) for name, content in booted.items()})
    history = []
    for back, how, memory, run, disk, vmstate in steps:
        parent, parts = history[-1 - back % len(history)] if history else ("", base)
        before, parts = parts, apply(parts, memory, run, disk)
        raws = capture(parts, base, extra)
        if parent and how.startswith("inherit"):
            changed = delta(parts, before)
            raws = changed if how == "inherit" else [changed[0], raws[1]]
        report = store.write(
            raws,
            vmstate,
            META,
            template=template,
            parent_id="" if how == "alone" else parent,
            sources=[BLOCKS],
        )
        history.append((report.snapshot_id, parts))
        check(store, report.snapshot_id, parts, base, template, vmstate)
        store.verify(report.snapshot_id)
    target = tmp_path_factory.mktemp("m") / "memory"
    ref, parts = history[-1]
    store.materialise(ref, "memory", target, template=template, sources=[BLOCKS])
    assert target.read_bytes() == pages_of(parts["memory"]).tobytes()
    kept = history[::2]
    store.collect([ref for ref, _ in kept], grace_s=0, now=blobs.stat("manifests/" + history[-1][0]).modified_s + 9)
    live = {ref for ref, _ in kept} | ({template.template_id} if template else set())
    assert set(store.list_ids()) == live
    for ref, parts in kept:
        store.verify(ref)
        for name, content in parts.items():
            overlay = store.overlay(ref, name, template=template, sources=[BLOCKS])
            assert overlay.indices.tolist() == np.flatnonzero(content != base[name]).tolist()
    store.close()
