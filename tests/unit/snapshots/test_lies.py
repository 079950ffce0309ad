"""A manifest, a layer or a map that lies about counts, under a right hash: refused before memory is taken for the lie."""

import copy
import json
import tracemalloc

import pytest
from blake3 import blake3

from recess.errors import Corrupt
from recess.frames import SeekableReader
from recess.frames.index_v2 import encode_index
from recess.frames.seekable import encode_tail
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.keys import key_of, make_id
from recess.snapshots.layer_v1 import KIND, LayerReader
from tests.unit.snapshots.helpers import Blobs, raw

META = SnapshotMeta(fingerprint={}, spec={})
ROOM = 8 << 20  # what reading the honest one needs is far below, what the lies say far above


@pytest.fixture(scope="module")
def told():
    blobs = Blobs()
    store = Store(blobs)
    ref = store.write([raw("memory", 1 << 16, {n: n + 1 for n in range(40)})], b"device state", META).snapshot_id
    yield blobs, store, json.loads(blobs.get(key_of(ref), max_bytes=1 << 20))
    store.close()


def read_all(store, ref):
    store.overlay(ref, "memory", template=None)
    store.vmstate(ref)
    store.verify(ref)


def peak_of(act):
    tracemalloc.start()
    try:
        act()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def put_manifest(blobs, fields):
    data = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ref = make_id("snp", blake3(data).hexdigest())
    blobs.put(key_of(ref), data)
    return ref


LIES = {
    "pages of the part": lambda m: m["parts"]["memory"].update(pages=1 << 28),
    "pages in layers": lambda m: m["parts"]["memory"].update(layer=1 << 16),
    "pages in blocks": lambda m: m["parts"]["memory"].update(block=1 << 15),
    "pages of zeros": lambda m: m["parts"]["memory"].update(zero=60_000),
    "slots of the layer": lambda m: m["layers"][0].update(entries=1 << 40),
    "slots in use": lambda m: m["layers"][0].update(live=39),
    "bytes of the layer": lambda m: m["layers"][0].update(bytes=1 << 40),
    "nodes of the pack": lambda m: m["pagemaps"][0].update(entries=1 << 40),
    "bytes of the pack": lambda m: m["pagemaps"][0].update(bytes=1 << 40),
    "bytes of the device state": lambda m: m["vmstate"].update(raw_bytes=1 << 27),
    "bytes of its file": lambda m: m["vmstate"].update(bytes=1 << 40),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_manifest_that_lies_about_counts(told, lie):
    blobs, store, honest = told
    fields = copy.deepcopy(honest)
    assert peak_of(lambda: read_all(store, put_manifest(blobs, fields))) < ROOM
    lie(fields)
    ref = put_manifest(blobs, fields)

    def look():
        with pytest.raises(Corrupt):
            read_all(store, ref)

    assert peak_of(look) < ROOM


def test_a_layer_that_claims_more_slots_than_its_frames_hold(told):
    """A fuzzer's find: 137 MB were taken for a claim of 34 million."""
    blobs, _, honest = told
    layer = blobs.get(key_of(honest["layers"][0]["id"]), max_bytes=1 << 30)
    good = SeekableReader(lambda at, size: layer[at : at + size], len(layer), None, KIND, "layer")
    frames = layer[: int(good.table.offsets[-1])]
    for slots in (0, 39, 41, 1 << 28):
        extra = good.extra[:12] + slots.to_bytes(4, "little") + good.extra[16:]
        data = frames + encode_tail(good.table, encode_index(KIND, good.table, extra))
        liar = SeekableReader(lambda at, size, data=data: data[at : at + size], len(data), None, KIND, "liar")

        def look(liar=liar):
            with pytest.raises(Corrupt):
                LayerReader(liar)

        assert peak_of(look) < ROOM
