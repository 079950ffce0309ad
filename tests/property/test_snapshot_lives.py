"""Random lives of snapshots: taken, forked, named, suspended, removed, pruned, swept, and servers killed at every named
step of it, over the fake driver, a real database and real files. Whatever happens:

- every snapshot that has a row is whole, and comes back with the content it was taken with;
- what a suspended machine would come back from has a row;
- after a sweep nothing is stored that nobody names.
"""

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recess import crashpoints
from recess.drivers.fake.pages import POKE_FIRST
from recess.errors import RecessError
from recess.snapshots import rewrite
from recess.snapshots.keys import id_of
from recess.snapshots.recompression import Recompression
from recess.snapshots.sweep import mark
from recess.testing.crash import Crashed, known_crash_points
from recess.testing.machine_room import SMALL, machine_room
from recess.units import MIB

BIG = replace(SMALL, memory_bytes=256 * MIB)
HOUR = 3600.0
POINTS = [
    point for point in known_crash_points()
    if point.startswith(("blobs.", "snapshot.", "collect.", "discard.", "keeping.", "recompress.", "joining."))
    or point in ("machines.stored", "machines.snapshot_row", "machines.evicted")
]  # fmt: skip

which = st.integers(0, 99)
ops = st.one_of(
    st.tuples(st.just("write"), which, st.integers(0, 5)),
    st.tuples(st.just("snapshot"), which, st.sampled_from(["", "aa:1", "aa:2", "bb"])),
    st.tuples(st.just("automatic"), which, st.sampled_from(["idle", "turn"])),
    st.tuples(st.just("cancel"), which, st.just("")),
    st.tuples(st.just("fork"), which, st.just("")),
    st.tuples(st.just("suspend"), which, st.just("")),
    st.tuples(st.just("resume"), which, st.just("")),
    st.tuples(st.just("restore"), which, st.just("")),
    st.tuples(st.just("remove"), which, st.booleans()),
    st.tuples(st.just("prune"), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("drop"), which, st.just("")),
    st.tuples(st.just("collect"), which, st.just("")),
    st.tuples(st.just("recompress"), which, st.just("")),
)
crash = st.none() | st.tuples(st.sampled_from(POINTS), st.integers(0, 4))
lives = st.lists(st.tuples(ops, crash), min_size=3, max_size=14)


class Life:
    """One room and what is known about it: the content of each machine now, and of each snapshot when it was taken."""

    def __init__(self, room):
        self.room = room
        self.content = {}  # by snapshot
        self.values = {}  # by machine; those that are gone stay, for the snapshots they left

    async def machine(self, number, *states):
        rows = [m for m in await self.room.manager.list_machines(everything=True) if m.state in states]
        return sorted(rows, key=lambda m: m.created)[number % len(rows)] if rows else None

    async def row(self, number):
        rows = sorted(await self.room.manager.list_snapshots(), key=lambda s: (s.created, s.id))
        return rows[number % len(rows)] if rows else None

    async def read(self, ref):
        return await self.room.sh(ref, "cat /root/data /dev/shm/data")

    async def learn(self, op):
        """Note what machines and snapshots hold that came to be in the step just done, finished or not."""
        machines = await self.room.manager.list_machines(everything=True)
        for one in machines:
            if one.id not in self.values:
                origin = one.meta["origin"]
                forked = op == "fork"
                self.values[one.id] = self.values[origin["machine"]] if forked else self.content[origin["snapshot"]]
        for row in await self.room.manager.list_snapshots():
            self.content.setdefault(row.id, self.values[row.machine])


async def act(life, op, number, extra):
    room, manager = life.room, life.room.manager
    if op == "collect":
        await manager.collect(grace_s=-HOUR)
        return
    if op == "recompress":
        policy = Recompression(after_s=1.0, level=3)
        await asyncio.to_thread(
            room.store.recompress, policy, now=time.time() + HOUR, stopped=lambda: False, tell=lambda line: None
        )
        return
    if op == "prune":
        await manager.keeping.prune(keep_last=number, older_than_s=0.0, everything=extra)
        return
    if op in ("remove", "restore"):
        row = await life.row(number)
        if row is None:
            return
        if op == "remove":
            await manager.keeping.remove(row.id, force=extra)
        else:
            await manager.restore(row.id)
        return
    states = {"resume": ("suspended",), "drop": ("running", "suspended")}.get(op, ("running",))
    machine = await life.machine(number, *states)
    if machine is None:
        return
    if op == "write":
        await room.sh(machine.id, f"echo {extra} > /root/data; echo {extra} > /dev/shm/data")
        room.host.vms[machine.id].poke(POKE_FIRST + extra, b"page %d" % extra)
        life.values[machine.id] = f"{extra}\n{extra}\n"
    elif op == "snapshot":
        await manager.snapshot(machine.id, name=extra)
    elif op == "automatic":
        await manager.snapshot(machine.id, why=extra)
    elif op == "cancel":
        taken = await manager.snapshot(machine.id, why="idle", resume=False)
        await manager.unpause(machine.id)
        await manager.discard_snapshot(machine.id, taken.id)
    elif op == "fork":
        await manager.fork(machine.id)
    elif op == "suspend":
        await manager.suspend(machine.id)
    elif op == "resume":
        await manager.resume(machine.id)
    elif op == "drop":
        await manager.remove(machine.id, force=True)


async def step(life, op, crash):
    """Do one thing, perhaps dying in the middle of it; tell whether the server died."""
    if crash is not None:
        crashpoints.arm(crash[0], skip=crash[1])
    died = False
    try:
        with contextlib.suppress(RecessError):  # refused, and said why: whatever that changed is checked
            await act(life, *op)
        await asyncio.gather(*life.room.manager.fleet._aside, return_exceptions=True)  # what is deleted after it
        await asyncio.to_thread(life.room.store.settle)  # what is joined after it, or dies of it
    except Crashed:
        died = True
    if crash is not None:
        died = died or crash[0] not in crashpoints._armed
        crashpoints.disarm_all()
    await life.learn(op[0])
    if died:
        life.room.lose_store()
        await life.room.restart(killed=True)
    return died


async def check(life, *, swept):
    room = life.room
    rows = await room.manager.list_snapshots()
    for row in rows:
        await room.manager.verify_snapshot(row.id)
    ids = {row.id for row in rows}
    for machine in await room.manager.list_machines(everything=True):
        assert machine.state != "suspended" or machine.snapshot in ids
    if swept:
        templates = [t.manifest for t in await room.parts.catalog.templates.list_all()]
        needed = mark(room.store._blobs, [*ids, *templates])
        stored = {info.key for info in room.store._blobs.list_blobs()}
        assert stored <= needed
        assert {id_of(key) for key in stored} == {id_of(key) for key in needed}  # a layer in one form at least


async def live(folder, life_ops):
    """Live it, and check all the time; return how often the server died."""
    deaths = 0
    async with machine_room(folder, local_blobs=True) as room:
        life = Life(room)
        first = await room.manager.create(BIG, name="first")
        life.values[first.id] = "0\n0\n"
        await room.sh("first", "echo 0 > /root/data; echo 0 > /dev/shm/data")
        for op, crash in life_ops:
            died = await step(life, op, crash)
            deaths += died
            await check(life, swept=op[0] == "collect" and not died)
        await room.manager.collect(grace_s=-HOUR)
        await check(life, swept=True)
        for row in await room.manager.list_snapshots():
            born, _ = await room.manager.restore(row.id)
            assert await life.read(born.id) == life.content[row.id], row
            await room.manager.remove(born.id, force=True)
        for machine in await room.manager.list_machines():
            if machine.state == "running":
                assert await life.read(machine.id) == life.values[machine.id]
    return deaths


def test_there_are_points_of_every_kind():
    assert {point.partition(".")[0] for point in POINTS} == {
        "blobs", "snapshot", "collect", "discard", "keeping", "machines", "recompress", "joining",
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Have layers joined as soon as there are two, for a few dead pages: fourteen steps make no sixteen real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "JOIN_DEAD_MIN", 1)
        patch.setattr(rewrite, "FILES_MAX", 2)
        yield


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(life_ops=lives)
def test_whatever_happens_to_snapshots_those_with_a_row_are_whole(tmp_path_factory, life_ops):
    with contextlib.ExitStack() as stack:
        stack.callback(crashpoints.disarm_all)
        asyncio.run(live(tmp_path_factory.mktemp("life"), life_ops))


WORK = [("write", 0, 1), ("snapshot", 0, ""), ("write", 0, 2), ("suspend", 0, ""), ("resume", 0, "")]


@pytest.mark.parametrize("late", [0, 7])
@pytest.mark.parametrize("point", known_crash_points("joining."))
def test_a_server_dies_while_layers_are_joined_or_taken_over(tmp_path, point, late):
    """At each step of it, each time it comes there, in a life that gives it enough to do."""
    steps = [(op, (point, 0) if number >= late else None) for number, op in enumerate(4 * WORK)]
    try:
        assert asyncio.run(live(tmp_path, steps)) > 1
    finally:
        crashpoints.disarm_all()
