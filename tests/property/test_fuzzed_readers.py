"""Readers of foreign bytes: what a fuzzer found, what it began with, and random damage to both. See `recess.testing.fuzz`.

Nothing but Recess's own errors may come out: that is what calling a target checks. `make fuzz` looks for more.
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.testing.fuzz import TARGETS, give_files
from tests.golden.test_snapshot_formats import stored_files

CORPUS = Path(__file__).parent / "corpus"
SEEDS = [(path.parent.name, path) for path in sorted(CORPUS.glob("*/*"))]


@pytest.fixture(scope="module", autouse=True)
def files():
    blobs, _ = stored_files()
    give_files({info.key: blobs.get(info.key, max_bytes=1 << 30) for info in blobs.list_blobs()})


def test_every_reader_has_a_corpus():
    assert {target for target, _ in SEEDS} == set(TARGETS)
    assert sum(path.stat().st_size for _, path in SEEDS) < 300_000  # small enough for a repository


@pytest.mark.parametrize(("target", "path"), SEEDS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_the_corpus(target, path):
    TARGETS[target](path.read_bytes())


spot = st.integers(0, 1 << 16)
damage = st.lists(
    st.tuples(st.just("flip"), spot, st.integers(0, 7))
    | st.tuples(st.just("set"), spot, st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    | st.tuples(st.just("cut"), spot, st.integers(1, 64))
    | st.tuples(st.just("put"), spot, st.binary(min_size=1, max_size=9)),
    min_size=1, max_size=6,
)  # fmt: skip


def damaged(data, acts):
    out = bytearray(data)
    for act, where, what in acts:
        at = where % (len(out) + 1)
        if act == "cut":
            del out[at : at + what]
        elif act == "put":
            out[at:at] = what
        elif at < len(out):
            out[at] = out[at] ^ (1 << what) if act == "flip" else what
    return bytes(out)


@pytest.mark.parametrize("target", sorted(TARGETS))
@settings(deadline=None, derandomize=True)  # the same damage each time: `make fuzz` looks further
@given(data=st.data())
def test_damage(target, data):
    path = data.draw(st.sampled_from([path for name, path in SEEDS if name == target]))
    TARGETS[target](damaged(path.read_bytes(), data.draw(damage)))


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("page_map", "recess.snapshots.pagemap_v1._decode_leaf"),
        ("frames_file", "recess.testing.fuzz._use"),
        ("frame", "recess.testing.fuzz.decode_frame"),
        ("frames_index", "recess.testing.fuzz.decode_index"),
        ("manifest", "recess.snapshots.manifest_v1._check_claims"),
        ("archive", "recess.snapshots.archive_v1._item"),
        ("guest", "recess.guestlink.channel.Channel._on_reply"),
        ("gvisor_state", "recess.drivers.gvisor.pages._gather"),
        ("page_faults", "recess.testing.fuzz_machines.parse_regions"),
        ("proxy", "recess.broker.proxy.relay_request"),
    ],
)
def test_a_fault_of_ours_is_not_swallowed(monkeypatch, target, place):
    """The net is tight: an error that is not Recess's own comes out of every target."""

    def broken(*_args, **_more):
        raise IndexError("a bug")

    monkeypatch.setattr(place, broken)
    with pytest.raises(IndexError):
        _replay(target)


def _replay(target):
    for name, path in SEEDS:
        if name == target:
            TARGETS[target](path.read_bytes())
