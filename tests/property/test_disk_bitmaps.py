"""Random lives of a disk: writes, captures that are stored, lost or cut off, servers that die, restores. Whatever a capture
leaves out of the disk is what the snapshot it counts from holds there.

What is asked of QEMU is real (`blocks.plan_copy`, `LiveCopy.start`, `commit`); QEMU's block layer is a model of its bitmaps,
all or nothing in a transaction as QEMU does it, and of the keeper's word on what captures count from.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.crashpoints import Crashed, arm, disarm_all
from recess.drivers.qemu import blocks
from recess.drivers.qemu.memory import Tracking
from recess.drivers.qemu.qmp import QmpRefused

BLOCKS = 12
Content = tuple[int, ...]


def refused(why: str) -> QmpRefused:
    return QmpRefused("transaction", {"class": "GenericError", "desc": why})


@dataclass
class Model:
    """QEMU with one disk: its blocks, the bitmaps of the disk's node, those of the copy's node."""

    disk: list[int]
    bitmaps: dict[str, set[int]] = field(default_factory=lambda: {blocks.SINCE_START: set()})
    copy: dict[str, set[int]] = field(default_factory=dict)
    copied: str = ""

    def write(self, block: int, value: int) -> None:
        self.disk[block] = value
        for bitmap in self.bitmaps.values():
            bitmap.add(block)

    def expect(self, *_args: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def execute(self, command: str, arguments: Any = None, **_options: Any) -> Any:
        if command == "query-named-block-nodes":
            known = [{"name": n, "recording": True, "count": len(b) * 4096} for n, b in self.bitmaps.items()]
            return [{"node-name": "disk", "dirty-bitmaps": known}, {"node-name": "root"}]
        assert command == "transaction"
        nodes = {"disk": dict(self.bitmaps), "capture": dict(self.copy)}
        for action in arguments["actions"]:
            self._act(nodes, action["type"], action["data"])
        self.bitmaps, self.copy = nodes["disk"], nodes["capture"]
        return {}

    def _act(self, nodes: dict[str, dict[str, set[int]]], kind: str, data: Any) -> None:
        if kind == "blockdev-backup":
            if data["bitmap"] not in nodes[data["device"]] or data["bitmap-mode"] != "never":
                raise refused("no such bitmap, or it would be cleared")
            self.copied = data["bitmap"]
            return
        bitmaps, name = nodes[data["node"]], data.get("name") or data["target"]
        if kind == "block-dirty-bitmap-add":
            if name in bitmaps or data["disabled"] != (data["node"] == "capture"):
                raise refused("it is there, or it does not record")
            bitmaps[name] = set()
        elif kind == "block-dirty-bitmap-merge":
            bitmaps[name] = bitmaps[name].union(*(nodes[s["node"]][s["name"]] for s in data["bitmaps"]))
        elif kind == "block-dirty-bitmap-remove":
            del bitmaps[name]
        else:
            raise AssertionError(kind)


class Life:
    """One VM at a time, its keeper's word (`base`), what is stored, and what the server remembers of the last capture."""

    def __init__(self) -> None:
        self.stored: dict[str, Content] = {}
        self.start(Model([0] * BLOCKS), "")

    def start(self, qemu: Model, base: str) -> None:
        self.qemu, self.base, self.generation, self.found = qemu, base, 0, tuple(qemu.disk)
        self.serve()

    def serve(self) -> None:
        """A new server: it knows what keeper and QEMU know."""
        self.vm = SimpleNamespace(
            qmp=self.qemu, tracking=Tracking("kernel", "", self.base), disk_after=0, journal=SimpleNamespace(base="template"),
            host=SimpleNamespace(qemu=SimpleNamespace(devices_command=True, version=(7, 2, 22))),
        )  # fmt: skip
        self.taken: tuple[int, Content] | None = None

    async def capture(self, *, disk_too: bool, ends: str) -> None:
        """`ends`: ok; failed after the pause; lost with the server in the pause."""
        parent = self.base if disk_too else ""
        plan = await blocks.plan_copy(self.vm, parent)
        assert plan.parent == parent
        self.taken = None
        copy = blocks.LiveCopy(self.vm, plan)
        await copy.start()
        self.generation += 1
        now = tuple(self.qemu.disk)
        changed, self.qemu.copy = self.qemu.copy.get("changed"), {}
        if ends == "lost":
            return self.serve()
        if ends == "failed":
            return None
        assert plan.bitmap == self.qemu.copied
        assert changed is not None
        before = self.stored[parent] if parent else self.found
        assert tuple(now[n] if n in changed else before[n] for n in range(BLOCKS)) == now
        self.vm.disk_after = self.generation
        self.taken = (self.generation, now)
        return None

    async def store(self, crash: str) -> None:
        """Store the last capture, and have the next ones count from it as `QemuVm.committed` does."""
        if self.taken is None:
            return None
        generation, content = self.taken
        snapshot = f"snp_{len(self.stored)}"
        self.stored[snapshot] = content
        if crash == "before the keeper":
            return self.serve()
        before, self.base = self.base, snapshot
        self.vm.tracking = Tracking("kernel", "", snapshot)
        if crash:
            arm(crash)
        try:
            if generation == self.vm.disk_after:
                await blocks.commit(self.vm, before, snapshot)
        except Crashed:
            self.serve()
        finally:
            disarm_all()
        return None

    def restore(self, which: int) -> None:
        if self.stored:
            snapshot = sorted(self.stored)[which % len(self.stored)]
            self.start(Model(list(self.stored[snapshot])), snapshot)


steps = st.one_of(
    st.tuples(st.just("write"), st.integers(0, BLOCKS - 1), st.integers(0, 3)),
    st.tuples(st.just("capture"), st.booleans(), st.sampled_from(["ok", "ok", "ok", "failed", "lost"])),
    st.tuples(
        st.just("store"),
        st.sampled_from(["", "", "", "before the keeper", "qemu.disk_commit", "qemu.disk_committed"]),
        st.none(),
    ),
    st.tuples(st.just("snapshot"), st.integers(0, BLOCKS - 1), st.sampled_from(["", "", "qemu.disk_commit"])),
    st.tuples(st.just("restart"), st.none(), st.none()),
    st.tuples(st.just("restore"), st.integers(0, 9), st.none()),
)


async def live(life: Life, walk: list[tuple[str, Any, Any]]) -> None:
    for name, one, two in walk:
        if name == "write":
            life.qemu.write(one, two)
        elif name == "capture":
            await life.capture(disk_too=one, ends=two)
        elif name == "store":
            await life.store(one)
        elif name == "snapshot":  # stored while the guest writes on
            await life.capture(disk_too=True, ends="ok")
            life.qemu.write(one, 9)
            await life.store(two)
        elif name == "restart":
            life.serve()
        else:
            life.restore(one)
        assert len(life.qemu.bitmaps) <= 3  # however long it lives
    await life.capture(disk_too=True, ends="ok")


@settings(max_examples=80, deadline=None)
@given(walk=st.lists(steps, min_size=15, max_size=50))
def test_what_is_left_out_is_what_the_parent_holds(walk: list[tuple[str, Any, Any]]) -> None:
    asyncio.run(live(Life(), walk))


def test_a_stored_capture_makes_the_next_one_small() -> None:
    """The list of the next is what was written since, not since the start; a failure in between changes nothing of it."""

    async def story() -> None:
        life = Life()
        for block in range(8):
            life.qemu.write(block, 1)
        await life.capture(disk_too=True, ends="ok")
        await life.store("")
        life.qemu.write(1, 2)
        await life.capture(disk_too=True, ends="failed")
        life.qemu.write(9, 2)
        await life.capture(disk_too=True, ends="lost")
        await life.capture(disk_too=True, ends="ok")
        assert life.qemu.copied == blocks.since("snp_0")
        assert life.qemu.bitmaps[life.qemu.copied] == {1, 9}
        await life.store("qemu.disk_commit")
        await life.capture(disk_too=True, ends="ok")
        assert life.qemu.copied == blocks.SINCE_START  # more than it needs, never less

    asyncio.run(story())


def test_a_bitmap_that_does_not_record_is_not_counted_from() -> None:
    async def story() -> None:
        nodes = [{"node-name": "disk", "dirty-bitmaps": [
            {"name": blocks.SINCE_START, "recording": True, "count": 8192},
            {"name": blocks.since("snp_a"), "recording": False, "count": 0},
        ]}]  # fmt: skip

        async def execute(*_args: Any) -> Any:
            return nodes

        found = await blocks.find_bitmaps(SimpleNamespace(execute=execute))  # type: ignore[arg-type]
        assert found == {blocks.SINCE_START: 8192}
        assert blocks.plan_disk(found, "snp_a") == blocks.DiskPlan(blocks.SINCE_START, "snp_a", 8192, listed=True)

    asyncio.run(story())


def test_only_over_a_template_a_whole_disk_is_told_by_numbers() -> None:
    """A disk that was booted stands on nothing that a snapshot could be compared with; one that QEMU cannot list is compared."""
    known = {blocks.SINCE_START: 4096}
    assert blocks.plan_disk(known, "", over_template=True).listed
    assert not blocks.plan_disk(known, "").listed

    async def story() -> None:
        life = Life()
        life.vm.journal.base = "boot"
        assert not (await blocks.plan_copy(life.vm, "")).listed
        life.vm.journal.base, life.vm.host.qemu.devices_command = "template", False
        assert await blocks.plan_copy(life.vm, "snp_a") == blocks.DiskPlan(blocks.SINCE_START)

    asyncio.run(story())


@pytest.mark.parametrize(("version", "option"), [((7, 2, 22), False), ((10, 0, 2), False), ((10, 1, 0), True)])
def test_a_copy_begins_slowly_and_clears_nothing(version: tuple[int, int, int], option: bool) -> None:
    *_, job = blocks.begun(blocks.DiskPlan("since snp_a", "snp_a"), counts=True, version=version)
    assert (job["data"]["speed"], job["data"]["bitmap-mode"]) == (1, "never")
    assert ("on-cbw-error" in job["data"]) == option
