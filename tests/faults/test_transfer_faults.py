"""Transfers and shared stores when things break: crashes at every step, a store that fails, a listing that lags."""

from __future__ import annotations

import io
import secrets
from contextlib import asynccontextmanager

import pytest

from recess.blobs import LocalBlobs, MemoryBlobs, RetryingBlobs, RetryPolicy
from recess.blobs.s3 import open_bucket
from recess.config import load_config
from recess.errors import NotFound, OutOfSpace, RecessError, Unavailable
from recess.guestlink.link import ExecRequest
from recess.node.local import LocalNode
from recess.snapshots import Store
from recess.snapshots.archive import Import, announce, archive_pieces
from recess.snapshots.archive_v1 import ArchiveReader
from recess.snapshots.keys import key_of
from recess.snapshots.shared import RefKeepingBlobs, Refs, SharedStore
from recess.snapshots.transfer import check_there, closure, copy_snapshot
from recess.testing.blob_faults import FaultProxy
from recess.testing.blob_server import s3_server
from recess.testing.crash import crashing
from recess.testing.machine_room import SMALL
from tests.unit.snapshots.test_archive import no_files
from tests.unit.snapshots.test_shared import GRACE, write
from tests.unit.snapshots.test_transfer import World, quiet

FAST = RetryPolicy(tries=8, first_s=0.001, most_s=0.01)


@pytest.fixture(scope="module")
def world():
    made = World()
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def proxy(server):
    with FaultProxy(server.endpoint).running() as running:
        yield running


@pytest.fixture
def bucket(server):
    return server.make_bucket(f"t-{secrets.token_hex(6)}")


@pytest.fixture
def remote(server, proxy, bucket):
    return RetryingBlobs(open_bucket(bucket, server.through(proxy.url)), FAST)


@pytest.mark.parametrize("skip", range(0, 10, 2))
def test_a_crash_before_any_blob(world, tmp_path, skip):
    target = LocalBlobs(tmp_path)
    with crashing("transfer.before_blob", skip=skip):
        copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert not target.exists(key_of(world.second))
    report = copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert report.blobs_there == skip
    check_there(target, world.second)


@pytest.mark.parametrize("point", ["transfer.before_manifest", "blobs.before_sync", "blobs.before_link"])
def test_a_crash_near_the_commit(world, tmp_path, point):
    target = LocalBlobs(tmp_path)
    count = len(closure(world.blobs, world.second))
    with crashing(point, skip=0 if point.startswith("transfer") else count - 1):
        copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert not target.exists(key_of(world.second))
    assert copy_snapshot(world.blobs, target, world.second, tell=quiet).blobs_sent == 1
    check_there(target, world.second)


@pytest.mark.parametrize("point", ["import.before_manifest", "import.after_manifest"])
def test_a_crash_while_an_archive_is_taken_in(world, tmp_path, point):
    target = LocalBlobs(tmp_path / "blobs")
    archive = b"".join(archive_pieces(world.blobs, announce(world.blobs, world.second, "")))

    def take():
        return Import(target, ArchiveReader(io.BytesIO(archive).read), tmp_path, lambda: 1 << 40, no_files).run(
            tell=quiet
        )

    with crashing(point):
        take()
    assert target.exists(key_of(world.second)) is (point == "import.after_manifest")
    take()
    check_there(target, world.second)
    store = Store(target)
    assert store.verify(world.second)["manifests"] == 2
    # A crashed import that nobody repeats is garbage, and nothing else: the sweep takes all of it.
    swept = store.collect([], grace_s=-10.0, now=LocalBlobs(tmp_path / "blobs").stat(key_of(world.second)).modified_s)
    assert swept["manifests"] == 2
    assert list(target.list_blobs()) == []
    store.close()


def test_a_push_rides_over_a_flaky_line(world, remote, proxy):
    proxy.flaky_every = 4
    copy_snapshot(world.blobs, remote, world.second, tell=quiet)
    proxy.cut(3)
    proxy.flaky_every = 5
    target = MemoryBlobs()
    copy_snapshot(remote, target, world.second, tell=quiet)
    check_there(target, world.second)


def test_a_push_that_gave_up_goes_on(world, remote, proxy):
    proxy.fail(1000)
    with pytest.raises(Unavailable):
        copy_snapshot(world.blobs, remote, world.second, tell=quiet)
    proxy._armed.clear()
    copy_snapshot(world.blobs, remote, world.second, tell=quiet)
    check_there(remote, world.second)


def test_a_full_disk_while_pulling(world):
    target = MemoryBlobs(capacity_bytes=3000)
    with pytest.raises(OutOfSpace):
        copy_snapshot(world.blobs, target, world.second, tell=quiet)
    assert not target.exists(key_of(world.second))
    target.capacity_bytes = None
    copy_snapshot(world.blobs, target, world.second, tell=quiet)
    check_there(target, world.second)


def test_a_listing_that_lags_loses_nobody_anything(remote, proxy):
    a, b = SharedStore(remote, "a" * 16), SharedStore(remote, "b" * 16)
    try:
        old = write(a, 1)
        proxy.forgetful = True
        new = write(a, 5, parent_id=old)
        a.refs.give_name("late:v1", new, 1.0)
        with pytest.raises(NotFound):
            b.find("late:v1")  # not seen yet; it says that it is not there, not something wrong
        later = remote.stat(key_of(new)).modified_s + GRACE / 2
        b.collect([], grace_s=GRACE, now=later)  # everything is young
        assert a.verify(old)
        assert a.verify(new)
        proxy.forgetful = False
        assert b.find("late:v1") == new
        counts = b.collect([], grace_s=GRACE, now=later + 10 * GRACE)  # everything is old, and a's
        assert (counts["manifests"], counts["files"]) == (0, 0)
        assert a.verify(new)
    finally:
        a.close()
        b.close()


def test_a_name_comes_with_its_manifest(world):
    blobs = MemoryBlobs()
    refs = Refs(blobs, "a" * 16)
    copy_snapshot(world.blobs, RefKeepingBlobs(blobs, refs), world.second, tell=quiet)
    assert refs.of_others() == []
    assert Refs(blobs, "b" * 16).of_others() == sorted([world.second, world.template])


# --- a node whose store fails under it --------------------------------------------------------------------------------


@asynccontextmanager
async def node_on(tmp_path, where, endpoint, monkeypatch):
    monkeypatch.setattr("recess.blobs.retry.RetryPolicy.__init__.__defaults__", (3, 0.001, 0.01, 5.0))
    config = load_config(
        {}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake", store=f"{where}/store",
        s3_endpoint=endpoint, s3_region="us-east-1", s3_access_key_id="id", s3_secret_access_key="secret",
    )  # fmt: skip
    node = await LocalNode.open(config)
    try:
        yield node
    finally:
        for row in await node.machines.list_machines(everything=True):
            await node.machines.remove(row.id, force=True)
        await node.close(detach=False)


async def say(node, ref):
    link = await node.machines.link((await node.machines.get(ref)).id)
    job = await link.exec(ExecRequest(argv=["echo", "alive"]))
    return b"".join([data async for _, data in job.output()])


async def test_a_machine_stays_warm_while_its_store_is_down(tmp_path, bucket, proxy, monkeypatch):
    async with node_on(tmp_path, bucket, proxy.url, monkeypatch) as node:
        await node.machines.create(SMALL, name="dev")
        first = await node.machines.snapshot("dev", name="first:v1")
        proxy.down = True
        for act in (node.machines.snapshot, node.machines.suspend):
            with pytest.raises(RecessError) as caught:
                await act("dev")
            assert caught.value.code == "unavailable"
            assert (await node.machines.get("dev")).state == "running"
            assert await say(node, "dev") == b"alive\n"
        copy, report = await node.machines.restore("first:v1")  # its copies are on this disk
        assert report.rung == 2
        assert await say(node, copy.id) == b"alive\n"
        proxy.down = False
        second = await node.machines.snapshot("dev", name="second:v1")
        await node.machines.suspend("dev")
        await node.machines.resume("dev")
        assert await say(node, "dev") == b"alive\n"
        assert {r.id for r in await node.machines.list_snapshots()} >= {first.id, second.id}
