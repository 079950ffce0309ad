"""A crash at every named point of a snapshot's way: the old snapshots stay, the new one is whole or not there."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from recess.blobs import LocalBlobs
from recess.crashpoints import Crashed, arm, arm_from_config, crash_point, disarm_all
from recess.snapshots import SnapshotMeta, Store
from recess.snapshots.recompression import Recompression
from recess.testing.crash import crashing, known_crash_points
from tests.unit.snapshots.helpers import ALIKE, page, raw
from tests.unit.snapshots.test_store import read

META = SnapshotMeta(fingerprint={}, spec={})
OLD = {0: 1, 1: 2, 700: 3}
NEW = {0: 1, 1: 9, 700: 3}
WRITE_POINTS = [p for p in known_crash_points() if p.startswith(("blobs.", "snapshot.")) and "materialised" not in p]


def whole(store, ref, content):
    store.verify(ref)
    return read(store, ref, "memory", template=None) == {n: page(v).tobytes() for n, v in content.items()}


@pytest.fixture
def stored(tmp_path):
    blobs = LocalBlobs(tmp_path / "blobs")
    store = Store(blobs)
    old = store.write([raw("memory", 1000, OLD)], b"old", META).snapshot_id
    yield tmp_path / "blobs", store, old
    store.close()


def test_the_points_exist():
    assert {"snapshot.before_file", "snapshot.before_manifest", "snapshot.after_manifest"} <= set(WRITE_POINTS)
    assert {"blobs.before_sync", "blobs.before_link", "blobs.before_folder_sync"} <= set(WRITE_POINTS)


@pytest.mark.parametrize("point", WRITE_POINTS)
@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_a_crash_while_writing(stored, point, skip):
    root, store, old = stored
    arm(point, skip=skip)
    try:
        store.write([raw("memory", 1000, NEW)], b"new", META, parent_id=old)
        crashed = False
    except Crashed:
        crashed = True
    finally:
        disarm_all()
    assert crashed or skip > 0
    store.close()  # the threads of a dead process do nothing more
    after = Store(LocalBlobs(root))  # the next process
    ids = after.list_ids()
    assert old in ids
    assert whole(after, old, OLD)
    for ref in set(ids) - {old}:
        assert whole(after, ref, NEW)
    later = time.time() + 100
    after.collect([old], grace_s=0, now=later)
    assert after.list_ids() == [old]
    assert whole(after, old, OLD)
    assert list((root / ".tmp").iterdir()) == []
    assert len(list(after._blobs.list_blobs())) == 4  # layer, page maps, device state, manifest
    again = after.write([raw("memory", 1000, NEW)], b"new", META, parent_id=old).snapshot_id
    assert whole(after, again, NEW)
    after.close()


def test_a_crash_after_the_manifest_leaves_a_whole_snapshot(stored):
    root, store, old = stored
    with crashing("snapshot.after_manifest"):
        store.write([raw("memory", 1000, NEW)], b"new", META, parent_id=old)
    store.close()
    after = Store(LocalBlobs(root))
    (new,) = set(after.list_ids()) - {old}
    assert whole(after, new, NEW)
    after.close()


@pytest.mark.parametrize("skip", range(4))
def test_a_crash_in_the_middle_of_a_sweep(stored, skip):
    root, store, old = stored
    new = store.write([raw("memory", 1000, NEW)], b"new", META, parent_id=old).snapshot_id
    store.write([raw("memory", 1000, {5: 5})], b"other", META)
    later = time.time() + 100
    with crashing("collect.between_deletions", skip=skip):
        store.collect([new], grace_s=0, now=later)
    after = Store(LocalBlobs(root))
    for ref in after.list_ids():
        after.verify(ref)  # never a manifest without its files
    after.collect([new], grace_s=0, now=later)
    assert after.list_ids() == [new]
    assert whole(after, new, NEW)
    assert after.collect([new], grace_s=0, now=later)["files"] == 0
    after.close()


def test_a_crash_while_materialising_leaves_the_target(stored, tmp_path):
    _, store, old = stored
    target = tmp_path / "ram"
    target.write_bytes(b"old")
    with crashing("snapshot.before_materialised"):
        store.materialise(old, "memory", target)
    assert target.read_bytes() == b"old"
    store.materialise(old, "memory", target)
    assert target.stat().st_size == 1000 * 4096


@pytest.mark.parametrize("point", ["snapshot.before_manifest", "blobs.before_folder_sync:1", "snapshot.after_manifest"])
def test_a_killed_process(tmp_path, point):
    """The same for real: SIGKILL, no clean-up of any kind."""
    program = f"""
        from pathlib import Path
        from recess.blobs import LocalBlobs
        from recess.crashpoints import arm_from_config
        from recess.snapshots import SnapshotMeta, Store
        from tests.unit.snapshots.helpers import raw
        store = Store(LocalBlobs(Path({str(tmp_path / "blobs")!r})))
        meta = SnapshotMeta(fingerprint={{}}, spec={{}})
        print(store.write([raw("memory", 1000, {OLD})], b"old", meta).snapshot_id, flush=True)
        arm_from_config({point!r})
        store.write([raw("memory", 1000, {NEW})], b"new", meta)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    old = ran.stdout.strip()
    store = Store(LocalBlobs(tmp_path / "blobs"))
    assert whole(store, old, OLD)
    assert (len(store.list_ids()) == 2) == point.startswith("snapshot.after")
    for ref in set(store.list_ids()) - {old}:
        assert whole(store, ref, NEW)
    store.close()


def test_an_unarmed_point_does_nothing():
    crash_point("snapshot.before_manifest")
    arm_from_config("")
    arm("other.point")
    crash_point("snapshot.before_manifest")
    disarm_all()


def test_crashing_notices_a_point_that_is_not_passed():
    with pytest.raises(AssertionError, match="never passed"), crashing("snapshot.before_manifest"):
        pass
    with pytest.raises(AssertionError, match="no such"), crashing("no.such"):
        pass


@pytest.mark.parametrize("skip", range(3))
def test_a_crash_in_the_middle_of_a_discard(stored, skip):
    root, store, old = stored
    new = store.write([raw("memory", 1000, NEW)], b"new", META, parent_id=old).snapshot_id
    with crashing("discard.between_deletions", skip=skip):
        store.discard(new)
    after = Store(LocalBlobs(root))
    assert after.list_ids() == [old]  # the manifest went first: what is left are files that nothing names
    assert whole(after, old, OLD)
    after.collect([old], grace_s=0, now=time.time() + 100)
    assert len(list(after._blobs.list_blobs())) == 4
    after.close()


RECOMPRESS_POINTS = [
    *known_crash_points("recompress."),
    "blobs.before_sync",
    "blobs.before_link",
    "blobs.before_folder_sync",
]


def recompress(store):
    policy = Recompression(after_s=1.0, level=9)
    return store.recompress(policy, now=time.time() + 100, stopped=lambda: False, tell=pytest.fail)


LARGE = {n: ALIKE + n for n in range(40)}  # so much alike that larger frames are worth it
LARGER = LARGE | {n: ALIKE + n for n in range(500, 540)}


@pytest.mark.parametrize("point", RECOMPRESS_POINTS)
def test_a_crash_while_recompressing(tmp_path, point):
    root = tmp_path / "blobs"
    store = Store(LocalBlobs(root), frame_bytes=4096)
    old = store.write([raw("memory", 1000, LARGE)], b"old", META).snapshot_id
    with crashing(point):
        recompress(store)
    store.close()
    after = Store(LocalBlobs(root), frame_bytes=4096)
    assert whole(after, old, LARGE)
    new = after.write([raw("memory", 1000, LARGER)], b"new", META, parent_id=old).snapshot_id
    recompress(after)
    assert whole(after, old, LARGE)
    assert whole(after, new, LARGER)
    after.collect([old, new], grace_s=0, now=time.time() + 100)
    stored_keys = [info.key for info in after._blobs.list_blobs()]
    assert not any(key.startswith("layers/") for key in stored_keys)
    assert len([key for key in stored_keys if key.startswith("recoded/")]) == 2
    assert list((root / ".tmp").iterdir()) == []
    after.discard(old)
    after.discard(new)
    assert list(after._blobs.list_blobs()) == []
    after.close()


@pytest.mark.parametrize("point", RECOMPRESS_POINTS)
def test_a_process_killed_while_recompressing(tmp_path, point):
    program = f"""
        import time
        from pathlib import Path
        from recess.blobs import LocalBlobs
        from recess.crashpoints import arm_from_config
        from recess.snapshots import SnapshotMeta, Store
        from recess.snapshots.recompression import Recompression
        from tests.unit.snapshots.helpers import raw
        store = Store(LocalBlobs(Path({str(tmp_path / "blobs")!r})), frame_bytes=4096)
        meta = SnapshotMeta(fingerprint={{}}, spec={{}})
        print(store.write([raw("memory", 1000, {LARGE})], b"old", meta).snapshot_id, flush=True)
        arm_from_config({point!r})
        store.recompress(Recompression(after_s=1.0, level=9), now=time.time() + 100, stopped=lambda: False, tell=print)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    old = ran.stdout.strip()
    store = Store(LocalBlobs(tmp_path / "blobs"))
    assert whole(store, old, LARGE)
    recompress(store)
    assert whole(store, old, LARGE)
    assert [key for key in (info.key for info in store._blobs.list_blobs()) if key.startswith("layers/")] == []
    store.close()
