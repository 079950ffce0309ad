"""Two processes on one store: one restores what the other deletes. Whole, or not there; never something else."""

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from blake3 import blake3

from recess.blobs import LocalBlobs
from recess.errors import NotFound
from recess.snapshots import SnapshotMeta, Store
from tests.unit.snapshots.helpers import page, raw

ROOT = Path(__file__).parent.parent.parent
META = SnapshotMeta(fingerprint={}, spec={})
PAGES = {n: n + 1 for n in range(600)}

READER = """
    import sys
    from pathlib import Path
    from blake3 import blake3
    from recess.blobs import LocalBlobs
    from recess.errors import NotFound
    from recess.snapshots import Store
    store, ref = Store(LocalBlobs(Path(sys.argv[1]))), sys.argv[2]
    while True:
        try:
            found = store.overlay(ref, "memory", template=None)
            store.vmstate(ref)
        except NotFound:
            print("gone", flush=True)
            break
        print(blake3(found.data.tobytes()).hexdigest(), flush=True)
    store.close()
"""
DELETER = """
    import sys
    from pathlib import Path
    from recess.blobs import LocalBlobs
    from recess.snapshots import Store
    store = Store(LocalBlobs(Path(sys.argv[1])))
    sys.stdin.readline()
    print(store.discard(sys.argv[2])["manifests"], flush=True)
    store.close()
"""


@contextlib.contextmanager
def python(program, *arguments):
    """A program in a process of its own, its ends as pipes."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    try:
        yield process
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def stored(tmp_path):
    store = Store(LocalBlobs(tmp_path / "blobs"), frame_bytes=4096)
    older = store.write([raw("memory", 1000, PAGES)], b"older", META).snapshot_id
    newer = store.write([raw("memory", 1000, PAGES | {5: 9999})], b"newer", META, parent_id=older).snapshot_id
    yield tmp_path / "blobs", store, older, newer
    store.close()


def digest(store, ref):
    return blake3(store.overlay(ref, "memory", template=None).data.tobytes()).hexdigest()


def test_a_snapshot_deleted_while_another_process_restores_it(stored):
    root, store, older, newer = stored
    expected = digest(store, older)
    with python(READER, root, older) as reader:
        assert reader.stdout.readline().strip() == expected  # it is at it
        assert store.discard(older)["manifests"] == 1
        seen = [line.strip() for line in reader.stdout]
    assert set(seen) <= {expected, "gone"}
    assert seen[-1] == "gone"
    store.verify(newer)  # what both used is there
    assert store.overlay(newer, "memory", template=None).data[5].tobytes() == page(9999).tobytes()


def test_another_snapshot_deleted_while_its_child_is_restored(stored):
    root, store, older, newer = stored
    expected = digest(store, newer)
    with python(READER, root, newer) as reader:
        assert reader.stdout.readline().strip() == expected
        store.discard(older)
        store.collect([newer], grace_s=0.0, now=store.blobs.stat(f"manifests/{newer}").modified_s + 3600.0)
        after = [reader.stdout.readline().strip() for _ in range(3)]
        store.discard(newer)
        rest = [line.strip() for line in reader.stdout]
    assert set(after) == {expected}
    assert rest[-1] == "gone"


def test_two_processes_delete_the_same(stored):
    root, store, older, newer = stored
    with python(DELETER, root, newer) as one, python(DELETER, root, newer) as other:
        for process in (one, other):
            process.stdin.write("now\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in (one, other)]
    assert sorted(said) == ["0", "1"]  # each manifest is deleted by one of them
    store.verify(older)
    assert store.list_ids() == [older]
    store.discard(older)
    assert list(store.blobs.list_blobs()) == []


def test_a_write_over_a_parent_that_another_process_deletes(stored):
    """Either the new snapshot is whole by itself, or its writer is told that the parent is not there."""
    root, store, older, newer = stored
    store.discard(older)
    with python(DELETER, root, newer) as other:
        other.stdin.write("now\n")
        other.stdin.flush()
        assert other.stdout.readline().strip() == "1"
    changed = PAGES | {7: 8888}
    with pytest.raises(NotFound):  # though this process remembers all of the parent
        store.write([raw("memory", 1000, changed)], b"child", META, parent_id=newer)
    alone = store.write([raw("memory", 1000, changed)], b"child", META).snapshot_id
    store.verify(alone)
