"""A stored snapshot as the fault handler's library: the right pages, read ahead or not, in few reads."""

import numpy as np
import pytest

from recess.blobs import LocalBlobs, MeteredBlobs
from recess.node.pagereader import SnapshotPages
from recess.paging.firstpages import FIRST, encode_first
from recess.snapshots import RawPart, SnapshotMeta, Store

TOTAL = 1024


@pytest.fixture
def made(tmp_path):
    """A snapshot of noise, zeros and gaps over a template of ones; what its memory is; its metered store."""
    memory = np.ones((TOTAL, 4096), np.uint8)
    memory[100:800:2] = np.random.default_rng(1).integers(0, 255, (350, 4096), np.uint8)
    memory[900:910] = 0
    listed = np.array([*range(100, 800, 2), *range(900, 910)], np.uint32)
    blobs = MeteredBlobs(LocalBlobs(tmp_path / "blobs"))
    store = Store(blobs)
    meta = SnapshotMeta(fingerprint={}, spec={FIRST: {"memory": encode_first([104, 100, 902])}})
    report = store.write([RawPart("memory", TOTAL, listed, memory[listed])], b"state", meta)
    store.close()
    template = tmp_path / "ram"
    template.write_bytes(b"\1" * 4096 * TOTAL)
    library = SnapshotPages(blobs, report.snapshot_id, "memory", template, {})
    yield library, memory, blobs
    library.close()


def brought(library, groups):
    return {
        piece.first + number: page.copy()
        for group in groups
        for piece in library.fetch(group)[0]
        for number, page in enumerate(piece.data)
    }


@pytest.mark.parametrize("ahead", [False, True])
def test_every_absent_page_comes_as_it_was(made, ahead):
    library, memory, _ = made
    groups = range(library.book.groups)
    if ahead:
        library.prefetch(list(groups)[::2])  # the others are read when they are fetched
    pages = brought(library, groups)
    assert sorted(pages) == library.book.pages.tolist()
    for number, page in pages.items():
        np.testing.assert_array_equal(page, memory[number])


def test_what_is_absent_is_known_before_who_brings_it(made):
    library, _, _ = made
    ranges = library.ranges()
    assert "_numbered" not in vars(library)
    assert ranges == library.book.ranges()
    library.take_all()
    assert library.book.count.tolist() == [library.pages_total]


def test_what_lies_together_is_read_at_once_and_counted_when_it_is_brought(made):
    library, _, blobs = made
    groups = list(range(library.book.groups))
    before = blobs.traffic
    library.prefetch(groups)
    read = sum(library.fetch(group)[1] for group in groups)
    came = blobs.traffic - before
    assert came.read_calls <= 22 / 8 + 1  # 22 frames
    assert read == came.read_bytes
    library.fetch(groups[0])
    assert (blobs.traffic - before).read_calls == came.read_calls + 1  # what was fetched is not kept


def test_the_hint_of_the_manifest_is_known(made):
    library, _, _ = made
    assert library.first_pages == [100, 104, 902]
