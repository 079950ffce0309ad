"""The pool's bookkeeping over VMs that are none: who waits, who is taken, who goes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recess.drivers.kept.keeper import Process
from recess.drivers.kept.layout import Layout
from recess.drivers.qemu.argv import Qemu
from recess.drivers.qemu.begun import Begun
from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.pool import BACK_OFF_S, WarmPool, free_memory
from recess.drivers.qemu.pool_member import FOLDER, Member, Order, order_for, sweep
from recess.drivers.qemu.pool_sizes import KEEP_S
from recess.errors import OutOfSpace
from recess.machines.contract import BootFiles, TemplateRef, VmSpec
from recess.units import GIB, MIB


class Waiting(Member):
    """A VM that is none."""

    def __init__(self, order: Order) -> None:
        super().__init__(order, Begun(Layout(Path("/nonexistent"), Path("/nonexistent"))), -1, -1)
        self.bytes = 30 * MIB
        self.dead = self.ended = False
        self.told: Callable[[object], None] = lambda _what: None

    def alive(self) -> bool:
        return not self.dead

    def on_death(self, told: Callable[[object], None]) -> None:
        self.told = told

    def not_on_death(self, told: Callable[[object], None]) -> None:
        assert told == self.told
        self.told = lambda _what: None

    def die(self) -> None:
        self.dead = True
        self.told(None)

    async def end(self) -> None:
        self.ended = True


class World:
    """A pool over VMs that are none, its clock, and everything it started."""

    def __init__(self, limit: int) -> None:
        self.now = 1000.0
        self.free = 8 * GIB
        self.started: list[Waiting] = []
        self.failure: Exception | None = None
        self.pool = WarmPool(limit, self._start, now=lambda: self.now, free_bytes=lambda: self.free, quiet_s=0.0)

    async def _start(self, order: Order) -> Member:
        if self.failure is not None:
            raise self.failure
        self.started.append(Waiting(order))
        return self.started[-1]

    async def restore(self, *orders: Order) -> list[Member | None]:
        """Have restores under way at the same time, long after those before; return what each got."""
        self.now += 10.0
        return self._nested(*orders)

    def _nested(self, *orders: Order) -> list[Member | None]:
        got: list[Member | None] = []
        if orders:
            with self.pool.under_way(orders[0]):
                got.append(self.pool.take(orders[0]))
                got += self._nested(*orders[1:])
        return got

    async def settled(self) -> int:
        await asyncio.wait_for(self.pool.settled(), 30)
        return self.pool.about().waiting

    async def look(self) -> int:
        """Have it look again now, as it does from time to time."""
        self.pool._look()
        return await self.settled()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("ram", "disk", "root", "qemu", "keeper"):
        (tmp_path / name).write_text(name)
    (tmp_path / "machines").mkdir()
    return tmp_path


def order(files: Path, template: str = "t", *, cpus: int = 1, network: str = "broker") -> Order:
    boot = BootFiles(files / "k", "k", files / "i", "i", files / "root", "r")
    ref = TemplateRef(template, files / "ram", files / "disk", files / "vmstate")
    host = HostFacts(Qemu(files / "qemu", (7, 2, 22), "tcg"), (), 1, "")
    layout = Layout(files / "run" / "m" / "x", files / "machines" / "x")
    found = order_for(layout, VmSpec(64 * MIB, cpus, 4096, boot, network), ref, host, files / "keeper", 1.0)
    assert found is not None
    return found


async def test_the_first_finds_none_and_the_next_one_finds_one(files: Path) -> None:
    world = World(4)
    assert await world.restore(order(files)) == [None]
    assert await world.settled() == 1
    assert await world.restore(order(files)) == [world.started[0]]
    assert await world.settled() == 1
    world.started[0].die()  # it is somebody else's by now
    about = world.pool.about()
    assert (about.taken, about.missed, about.limit, about.memory_bytes) == (1, 1, 4, 30 * MIB)
    await world.pool.close()
    assert [member.ended for member in world.started] == [False, True]  # the first is somebody's


async def test_only_the_very_same_kind_is_taken(files: Path) -> None:
    world = World(4)
    await world.restore(order(files))
    await world.settled()
    for other in (order(files, "other"), order(files, cpus=2)):
        assert world.pool.take(other) is None
    assert world.pool.take(order(files, network="none")) is world.started[0]  # networks differ above the VM
    await world.pool.close()


@pytest.mark.parametrize("name", ["ram", "disk", "root", "qemu", "keeper"])
async def test_a_file_that_was_replaced_makes_another_kind(files: Path, name: str) -> None:
    world = World(4)
    before = order(files)
    await world.restore(before)
    await world.settled()
    (files / "new").write_text("the new one")
    (files / "new").replace(files / name)
    assert not before.is_current()
    assert world.pool.take(order(files)) is None
    assert await world.look() == 0  # nobody can ever take it
    assert world.started[0].ended
    (files / name).unlink()
    assert not before.is_current()
    await world.pool.close()


async def test_a_missing_file_is_no_order(files: Path) -> None:
    good = order(files)
    (files / "ram").unlink()
    layout = Layout(files / "run" / "m" / "x", files / "machines" / "x")
    assert order_for(layout, good.kind.spec, good.template, good.host, files / "keeper", 1.0) is None
    world = World(4)
    with world.pool.under_way(None):
        assert world.pool.take(None) is None
    assert world.pool.about().missed == 0
    await world.pool.close()


async def test_a_burst_is_ready_for_the_next_one(files: Path) -> None:
    world = World(3)
    await world.restore(*[order(files)] * 5)
    assert await world.settled() == 3
    got = await world.restore(*[order(files)] * 4)
    assert got == [*world.started[:3], None]
    await world.pool.close()


async def test_none_is_started_while_a_restore_is_under_way(files: Path) -> None:
    world = World(2)
    await world.restore(order(files))
    world.now += 10.0
    with world.pool.under_way(order(files)):
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(50)))
        assert world.started == []
    assert await world.settled() == 1
    await world.pool.close()


async def test_it_shrinks_to_nothing_and_its_task_ends(files: Path) -> None:
    world = World(2)
    await world.restore(order(files))
    await world.settled()
    world.now += KEEP_S
    assert await world.look() == 0
    assert world.started[0].ended
    task = world.pool._keeping
    assert task is not None
    await asyncio.wait_for(task, 30)
    assert world.pool._orders == {}
    await world.pool.close()


async def test_little_memory_means_few(files: Path) -> None:
    world = World(4)
    await world.restore(*[order(files)] * 4)
    assert await world.settled() == 4
    world.free = 0  # and what the four hold is counted with it
    assert await world.look() == 0
    assert [member.ended for member in world.started] == [True] * 4
    await world.pool.close()


async def test_one_that_dies_is_replaced_after_a_while(files: Path) -> None:
    world = World(1)
    await world.restore(order(files))
    await world.settled()
    world.started[0].die()
    assert await world.settled() == 0
    assert world.started[0].ended
    assert len(world.started) == 1  # not at once: it may die again
    world.now += BACK_OFF_S
    assert await world.look() == 1
    await world.pool.close()


async def test_a_dead_one_is_never_taken(files: Path) -> None:
    world = World(1)
    await world.restore(order(files))
    await world.settled()
    world.started[0].dead = True  # and nobody was told yet
    assert world.pool.take(order(files)) is None
    await world.pool.close()


@pytest.mark.parametrize("failure", [OutOfSpace("no room"), OSError(95, "not supported")])
async def test_a_start_that_fails_is_not_repeated_at_once(files: Path, failure: Exception) -> None:
    world = World(1)
    world.failure = failure
    await world.restore(order(files))
    assert await world.settled() == 0
    world.failure = None
    assert await world.look() == 0
    world.now += BACK_OFF_S
    assert await world.look() == 1
    await world.pool.close()


async def test_switched_off_it_does_nothing(files: Path) -> None:
    world = World(0)
    assert await world.restore(order(files), order(files)) == [None, None]
    assert await world.settled() == 0
    about = world.pool.about()
    assert (about.limit, about.missed) == (0, 0)
    await world.pool.close()


async def test_it_is_resized_switched_off_and_on_again(files: Path) -> None:
    world = World(4)
    await world.restore(*[order(files)] * 4)
    assert await world.settled() == 4
    await world.pool.resize(1)
    assert world.pool.about().waiting == 1
    await world.pool.resize(0)
    assert [member.ended for member in world.started] == [True] * 4
    assert await world.restore(order(files)) == [None]
    await world.pool.resize(2)
    assert world.pool.about().waiting == 0  # nobody has asked since
    await world.restore(order(files))
    assert await world.settled() == 1
    await world.pool.close()


async def test_closed_it_starts_no_more(files: Path) -> None:
    world = World(2)
    await world.restore(order(files))
    await world.settled()
    await world.pool.close()
    await world.pool.close()
    assert world.started[0].ended
    assert await world.restore(order(files)) == [None]
    assert world.pool.about().waiting == 0


def test_only_what_nobody_owns_is_swept(tmp_path: Path) -> None:
    me = Process.of(os.getpid())
    mine = tmp_path / FOLDER / f"{me.pid}-{me.start}-1"
    gone = tmp_path / FOLDER / f"{me.pid}-{me.start - 1}-1"
    kept = tmp_path / FOLDER / f"{me.pid}-{me.start - 1}-2"
    strange = tmp_path / FOLDER / "else"
    for folder in (mine, gone, kept, strange):
        folder.mkdir(parents=True)
    (kept / "pids").write_text(f"keeper {me.pid} {me.start}\nvmm 1 1\n")
    sweep(tmp_path)
    assert sorted(tmp_path.joinpath(FOLDER).iterdir()) == sorted([mine, kept, strange])
    sweep(tmp_path / "nonexistent")


def test_the_hosts_free_memory_is_read() -> None:
    assert MIB < free_memory() < 1 << 50
