"""The snapshot store as its callers see it: what costs nothing, what is refused, what depends on what."""

import numpy as np
import pytest

from recess.errors import BadInput, Incompatible, NotFound
from recess.snapshots import RawPart, SnapshotMeta, Store
from recess.snapshots.forms import open_layer
from recess.snapshots.layer_v1 import LayerReader
from recess.snapshots.rewrite import FILES_MAX
from recess.snapshots.writer import PACKS_MAX
from tests.unit.snapshots.helpers import ArrayTemplate, Blobs, FileSource, page, pages, raw

META = SnapshotMeta(fingerprint={"driver": "fake"}, spec={"cpus": 1}, log_position=7, epoch=2, created=12.5, why="idle")
ROOT = FileSource([page(n) for n in (100, 101, 102)])
KERNEL = FileSource([page(n) for n in (200, 201)])


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def store(blobs):
    store = Store(blobs, frame_bytes=3 * 4096)
    yield store
    store.close()


@pytest.fixture
def template(store):
    content = {0: 1, 1: 2, 5: 3}
    report = store.write([raw("memory", 20, content), raw("disk0", 10, {})], b"boot", META)
    full = np.stack([page(content.get(n, 0)) for n in range(20)])
    return ArrayTemplate(report.snapshot_id, {"memory": full, "disk0": np.zeros((10, 4096), np.uint8)})


def read(store, ref, name, **more):
    overlay = store.overlay(ref, name, **more)
    return dict(zip(overlay.indices.tolist(), (row.tobytes() for row in overlay.data), strict=True))


def content(**numbers):
    return {int(k[1:]): page(v).tobytes() for k, v in numbers.items()}


def test_each_kind_of_page_is_counted_and_read_back(store, blobs, template):
    memory = {0: 1, 1: 0, 2: 50, 3: 50, 4: 101, 5: 3, 6: 201, 7: 0}  # equal, zeroed, new, double, root, equal, kernel
    report = store.write(
        [raw("memory", 20, memory), raw("disk0", 10, {9: 50, 8: 0})],
        b"state",
        META,
        template=template,
        sources=[ROOT, KERNEL],
    )
    assert report.pages_shared == {"template": 4, "zero": 1, "image": 1, "kernel": 1, "duplicate": 2}
    assert report.pages_new == 1
    kwargs = {"template": template, "sources": [KERNEL, ROOT]}
    assert read(store, report.snapshot_id, "memory", **kwargs) == content(p1=0, p2=50, p3=50, p4=101, p6=201)
    assert read(store, report.snapshot_id, "disk0", **kwargs) == content(p9=50)
    assert store.vmstate(report.snapshot_id) == b"state"
    assert store.verify(report.snapshot_id) == {
        "manifests": 2, "files": 8, "pages": 6 + 3,
        "bytes": sum(i.size_bytes for i in blobs.list_blobs() if not i.key.startswith("manifests/")),
    }  # fmt: skip


def test_new_bytes_is_what_the_store_grew_by(store, blobs):
    report = store.write([raw("memory", 20, {0: 5})], b"s", META)
    assert report.new_bytes == sum(info.size_bytes for info in blobs.list_blobs())
    again = store.write([raw("memory", 20, {0: 5})], b"s", META)
    assert (again.snapshot_id, again.new_bytes) == (report.snapshot_id, 0)
    assert set(report.timings_s) >= {"base", "compress", "page maps", "publish", "total"}


def test_the_manifest_says_what_it_was_told(store):
    ref = store.write([raw("memory", 20, {0: 5})], b"s", META).snapshot_id
    manifest = store.manifest(ref)
    for key, value in {
        "log_position": 7, "epoch": 2, "created_ms": 12500, "why": "idle", "fingerprint": {"driver": "fake"},
        "spec": {"cpus": 1}, "template": "", "parent": "", "forkable": True, "version": 1, "format": "recess.snapshot",
    }.items():  # fmt: skip
        assert manifest[key] == value
    assert manifest["parts"]["memory"] | {"root": ""} == {"pages": 20, "zero": 0, "block": 0, "layer": 1, "root": ""}


def test_an_unchanged_page_is_referred_to(store, template):
    first = store.write([raw("memory", 20, {2: 50, 3: 51, 4: 52})], b"", META, template=template)
    second = store.write(
        [raw("memory", 20, {2: 50, 3: 99, 4: 52})], b"", META, template=template, parent_id=first.snapshot_id
    )
    assert second.pages_shared == {"parent": 2}
    assert second.pages_new == 1
    assert read(store, second.snapshot_id, "memory", template=template) == content(p2=50, p3=99, p4=52)
    assert len(store.manifest(second.snapshot_id)["layers"]) == 2


def test_nothing_changed_makes_no_layer(store, template):
    part = raw("memory", 600, {2: 50, 599: 51})
    first = store.write([part], b"", META)
    second = store.write([part], b"", META, parent_id=first.snapshot_id)
    assert second.pages_new == 0
    manifests = [store.manifest(r.snapshot_id) for r in (first, second)]
    assert manifests[0]["layers"] == manifests[1]["layers"]
    assert manifests[0]["pagemaps"] == manifests[1]["pagemaps"]


def test_a_parent_over_another_template_still_saves_bytes(store, template):
    first = store.write([raw("memory", 20, {2: 50, 3: 51})], b"", META)
    second = store.write([raw("memory", 20, {2: 50, 0: 0})], b"", META, template=template, parent_id=first.snapshot_id)
    assert second.pages_shared == {"parent": 1, "zero": 1}
    assert read(store, second.snapshot_id, "memory", template=template) == content(p0=0, p2=50)


def test_a_page_that_went_back_to_what_it_was(store):
    """The new layer comes out as the very file that another page still refers to."""
    one = store.write([raw("memory", 20, {5: 70, 7: 70})], b"", META)
    two = store.write([raw("memory", 20, {5: 71, 7: 70})], b"", META, parent_id=one.snapshot_id)
    three = store.write([raw("memory", 20, {5: 70, 7: 70})], b"", META, parent_id=two.snapshot_id)
    assert store.manifest(three.snapshot_id)["layers"] == store.manifest(one.snapshot_id)["layers"]
    assert read(store, three.snapshot_id, "memory", template=None) == content(p5=70, p7=70)
    store.verify(three.snapshot_id)


def test_a_hundred_snapshots_stay_as_cheap_as_one(store, blobs):
    held, parent, new = {n: n + 1 for n in range(60)}, "", []
    for cycle in range(100):
        held[cycle * 7 % 60] = 1000 + cycle
        report = store.write([raw("memory", 2000, held)], b"", META, parent_id=parent)
        parent = report.snapshot_id
        new.append(report.pages_new)
    manifest = store.manifest(parent)
    assert len(manifest["layers"]) <= FILES_MAX
    assert len(manifest["pagemaps"]) <= PACKS_MAX
    assert sum(layer["entries"] for layer in manifest["layers"]) <= 2 * 60
    assert sum(new[1:]) < 5 * 99  # one page changed each time; the rest is rewriting
    assert read(store, parent, "memory", template=None) == {n: page(v).tobytes() for n, v in held.items()}


def test_a_layer_knows_whose_pages_it_holds(store, blobs):
    ref = store.write([raw("memory", 20, {3: 5, 4: 6, 9: 7}), raw("disk0", 9, {1: 8, 2: 5})], b"", META).snapshot_id
    record = store.manifest(ref)["layers"][0]
    layer = LayerReader(open_layer(blobs, record["id"], record["bytes"]))
    assert [(name, numbers.tolist()) for name, numbers in layer.owners()] == [("memory", [3, 4, 9]), ("disk0", [1])]


@pytest.mark.parametrize("over_template", [True, False])
def test_materialise_is_byte_for_byte(store, template, tmp_path, over_template):
    given = template if over_template else None
    memory = {0: 0, 3: 50, 19: 101}
    ref = store.write([raw("memory", 20, memory)], b"", META, template=given, sources=[ROOT]).snapshot_id
    full = template.part("memory").copy() if over_template else np.zeros((20, 4096), np.uint8)
    for where, what in memory.items():
        full[where] = page(what)
    store.materialise(ref, "memory", tmp_path / "ram", template=given, sources=[ROOT])
    assert (tmp_path / "ram").read_bytes() == full.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["ram"]


def test_materialise_keeps_holes(store, tmp_path):
    ref = store.write([raw("memory", 50_000, {40_000: 5})], b"", META).snapshot_id
    store.materialise(ref, "memory", tmp_path / "ram")
    found = (tmp_path / "ram").stat()
    assert found.st_size == 50_000 * 4096
    assert found.st_blocks * 512 < 1 << 20


def test_materialise_leaves_nothing_when_it_fails(store, tmp_path):
    ref = store.write([raw("memory", 20, {0: 101})], b"", META, sources=[ROOT]).snapshot_id
    (tmp_path / "ram").write_bytes(b"old")
    with pytest.raises(NotFound):
        store.materialise(ref, "memory", tmp_path / "ram")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"ram": b"old"}


def test_the_template_must_be_the_one(store, template):
    over = store.write([raw("memory", 20, {2: 5})], b"", META, template=template).snapshot_id
    alone = store.write([raw("memory", 20, {2: 5})], b"", META).snapshot_id
    other = ArrayTemplate(alone, {})
    for ref, given in ((over, None), (over, other), (alone, template)):
        with pytest.raises(Incompatible) as caught:
            store.overlay(ref, "memory", template=given)
        assert caught.value.details["reasons"]


def test_what_is_not_there(store):
    ref = store.write([raw("memory", 20, {0: 101})], b"", META, sources=[ROOT]).snapshot_id
    with pytest.raises(NotFound):
        store.manifest("snp_" + "0" * 64)
    with pytest.raises(NotFound):
        store.overlay(ref, "disk7", template=None)
    with pytest.raises(NotFound) as caught:
        store.overlay(ref, "memory", template=None, sources=[KERNEL])
    assert caught.value.details["ref"] == ROOT.source_hash
    with pytest.raises(NotFound):
        store.write([raw("memory", 20, {})], b"", META, parent_id="snp_" + "0" * 64)
    for bad in ("", "snp_1", "../../etc/passwd", f"lyr_{'0' * 64}"):
        with pytest.raises((BadInput, NotFound)):
            store.manifest(bad)


def test_prefixes(store):
    refs = [store.write([raw("memory", 20, {0: n})], b"", META).snapshot_id for n in range(1, 20)]
    assert store.list_ids() == sorted(refs)
    assert all(store.resolve(ref[:30]) == ref for ref in refs)
    with pytest.raises(BadInput):
        store.resolve("snp_")
    for absent in ("", "snp_zz", "lyr_"):
        with pytest.raises(NotFound):
            store.resolve(absent)


GOOD = raw("memory", 20, {0: 1, 3: 2})


@pytest.mark.parametrize(
    "parts",
    [
        [GOOD, GOOD],
        [RawPart("memory", 3, GOOD.indices, GOOD.data)],
        [RawPart("memory", 20, GOOD.indices[::-1], GOOD.data)],
        [RawPart("memory", 20, np.array([3, 3], np.uint32), GOOD.data)],
        [RawPart("memory", 20, GOOD.indices[:1], GOOD.data)],
        [RawPart("memory", 20, GOOD.indices.astype(np.int64), GOOD.data)],
        [RawPart("memory", 20, GOOD.indices, GOOD.data.T.copy())],
        [RawPart("memory", 20, GOOD.indices, pages(1, 2, 3, 4)[::2])],
        [RawPart("memory", 1 << 40, GOOD.indices, GOOD.data)],
        [RawPart("memory", 20, GOOD.indices, GOOD.data, zeros=np.zeros(3, np.bool_))],
        [RawPart("memory", 20, GOOD.indices, GOOD.data, zeros=np.zeros(2, np.uint8))],
    ],
)
def test_parts_that_contradict_themselves(store, blobs, parts):
    with pytest.raises(BadInput):
        store.write(parts, b"", META)
    assert list(blobs.list_blobs()) == []


def test_other_bad_input(store, blobs, template):
    with pytest.raises(BadInput):
        store.write([GOOD], b"", META, parent_id="base:v1")
    with pytest.raises(BadInput):
        store.write([raw("memory", 21, {})], b"", META, template=template)
    before = len(list(blobs.list_blobs()))
    with pytest.raises(BadInput):
        store.write([GOOD], b"", SnapshotMeta(fingerprint={}, spec={"x": object()}))
    with pytest.raises(BadInput):
        store.write([raw("Bad Name", 20, {})], b"", META)
    assert len(list(blobs.list_blobs())) == before
    for size in (0, 4095, 5000, 1 << 30):
        with pytest.raises(BadInput):
            Store(blobs, frame_bytes=size)


def test_dependents(store, template):
    first = store.write([raw("memory", 20, {2: 50, 3: 51})], b"a", META, template=template).snapshot_id
    second = store.write(
        [raw("memory", 20, {2: 50, 3: 52})], b"b", META, template=template, parent_id=first
    ).snapshot_id
    alone = store.write([raw("memory", 20, {2: 60})], b"c", META).snapshot_id
    everything = store.list_ids()
    assert store.dependents(template.template_id, everything) == sorted([first, second])
    assert store.dependents(first, everything) == [second]
    assert store.dependents(second, everything) == []
    assert store.dependents(alone, everything) == []


def test_large_device_state(store):
    vmstate = b"".join(page(n).tobytes() for n in range(700))
    ref = store.write([raw("memory", 20, {})], vmstate, META).snapshot_id
    assert store.vmstate(ref) == vmstate


def test_two_writers_at_once(store):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(store.write, [raw("memory", 40, {n % 5: n + 1})], b"same", META) for n in range(12)]
        refs = [job.result().snapshot_id for job in jobs]
    for n, ref in enumerate(refs):
        assert read(store, ref, "memory", template=None) == {n % 5: page(n + 1).tobytes()}
