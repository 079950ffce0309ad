"""Bringing machines back: resume a suspended one, restore a snapshot under a new or the old identity, fork a living one.

Which page comes from where was resolved when the snapshot was written; here are only two reads and one driver call.
A fork does not wait for the disk: children start from the captured pages while the same pages are being compressed
and stored, and are announced only when that snapshot is durable too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from recess.catalog.machines import MachineRecord
from recess.catalog.once import Once
from recess.errors import BadInput, Corrupt, NotFound, RecessError, Unsupported
from recess.machines.capture import Taken
from recess.machines.contract import MappedMemory, PageSet, RestoreParts
from recess.machines.fleet import Fleet
from recess.machines.identity import child_name
from recess.machines.launching import Launcher, child_spec
from recess.machines.live import Live
from recess.machines.mapped import mapped_capture, mapped_over
from recess.machines.parts import NO_PAGES, UNDO, Parts
from recess.machines.records import check_spec, spec_from_json
from recess.machines.service import Changes, ResumeReport, SnapshotRow
from recess.machines.snapshots import StoredSnapshots
from recess.machines.snapshotting import SnapshotTaker
from recess.machines.starting import Origin, finish
from recess.machines.states import SUSPENDED, next_state

FIRST_REPLY = (
    "first_reply"  # in a report's timings: from the call to guestd's first answer, its hello; the others are steps
)
FORK_MAX = 64
FORK_AT_ONCE = 4
LOCAL_RUNG = 2
REMOTE_RUNG = 3


class BringBack:
    """Restores and forks. Calls that name a record expect its lock to be held."""

    def __init__(
        self, parts: Parts, fleet: Fleet, launcher: Launcher, taker: SnapshotTaker, stored: StoredSnapshots
    ) -> None:
        self._parts = parts
        self._fleet = fleet
        self._launcher = launcher
        self._taker = taker
        self._stored = stored

    async def resume(self, record: MachineRecord, epoch: int) -> ResumeReport:
        """Bring back a suspended machine from its newest snapshot."""
        next_state(record.state, "resume", f"machine {record.name}")
        row = await self._stored.get(record.snapshot)
        _, report = await self._again(record, row, epoch)
        return report

    async def restore_as(
        self, record: MachineRecord, row: SnapshotRow, epoch: int, *, before: str = ""
    ) -> tuple[MachineRecord, ResumeReport]:
        """Bring a suspended, exited or dead machine back from this snapshot under its own identity. `before`: what was
        tried before, for the report."""
        next_state(record.state, "restore", f"machine {record.name}")
        return await self._again(record, row, epoch, before)

    async def _again(
        self, record: MachineRecord, row: SnapshotRow, epoch: int, before: str = ""
    ) -> tuple[MachineRecord, ResumeReport]:
        began = time.monotonic()
        # What lingers after an exit. Its disk is kept until the snapshot has been brought back: that may fail.
        await self._fleet.end(record.id, "it comes back from a snapshot", keep_disk=True)
        origin, _, _ = await self._stored.open(row.id, early=True)
        skip = {int(k): int(v) for k, v in dict(row.figures.get("output", {})).items()}
        own = row.machine == record.id
        why = "; ".join(word for word in (before, _why(record, row, origin)) if word)
        record, live, timings = await self._launcher.launch(
            record, origin, epoch=epoch, skip=skip if own else None, status=why
        )
        timings[FIRST_REPLY] = live.answered_s - began
        return record, await self._report(row, origin, timings, began, why)

    async def restore_new(
        self,
        row: SnapshotRow,
        *,
        name: str,
        session: str,
        epoch: int,
        changes: Changes | None = None,
        once: Once | None = None,
    ) -> tuple[MachineRecord, ResumeReport]:
        """Make a new machine from a snapshot. Raises Unsupported for one that was taken without guestd's consent."""
        _check_forkable(row)
        began = time.monotonic()
        origin, spec, _ = await self._stored.open(row.id, early=True)
        note = {"origin": {"snapshot": row.id, "machine": row.machine}}
        spec = child_spec(spec, changes)
        driver = origin.template.spec.driver
        check_spec(spec, self._parts.driver_of(driver).capabilities)
        record = await self._launcher.claim(spec, name=name, session=session, driver=driver, meta=note, once=once)
        async with self._fleet.lock(record.id):
            try:
                strict = changes is not None and changes.ports is not None
                record, live, timings = await self._launcher.launch(record, origin, epoch=epoch, strict_ports=strict)
                timings[FIRST_REPLY] = live.answered_s - began
            except UNDO:
                await self._launcher.abandon(record)
                raise
        return record, await self._report(row, origin, timings, began, f"restored from {row.name or row.id[:16]}")

    async def _report(
        self, row: SnapshotRow, origin: Origin, timings: Mapping[str, float], began: float, why: str
    ) -> ResumeReport:
        seconds = time.monotonic() - began
        origin = await origin.settled()
        rung = REMOTE_RUNG if origin.fetched_bytes else LOCAL_RUNG
        return ResumeReport(
            rung, why, seconds, snapshot=row.id, log_position=row.log_position,
            bytes_read=origin.bytes_read, timings_s={**origin.timings_s, **timings},
        )  # fmt: skip

    # --- fork --------------------------------------------------------------------------------------------------

    async def fork(self, record: MachineRecord, count: int, names: Sequence[str], session: str) -> list[MachineRecord]:
        """Make children of a machine; all of them or none. A suspended parent is forked from its snapshot."""
        if not 1 <= count <= FORK_MAX:
            raise BadInput(f"fork: from 1 to {FORK_MAX} children, got {count}")
        if names and len(names) != count:
            raise BadInput(
                f"fork: {len(names)} names for {count} children",
                hint="as many names as children, or none: --name a --name b",
            )
        if not self._parts.driver_of(record.driver).capabilities.fork:
            raise Unsupported(f"the driver {record.driver} cannot fork")
        if record.state == SUSPENDED:
            row = await self._stored.get(record.snapshot)
            _check_forkable(row)
            origin, _, _ = await self._stored.open(row.id, many=True)
            return await self._children(record, origin, count, names, session)
        for whole in (False, True):
            live, taken, origin_parts = await self._capture_for_children(record, whole=whole)
            try:
                return await self._fork_live(record, live, taken, origin_parts, count, names, session)
            except (Corrupt, NotFound):
                if not taken.capture.parent:
                    raise  # else what it counts from cannot be read any more: all of it, then
            finally:
                taken.capture.close()
        raise AssertionError("unreachable")

    async def _capture_for_children(self, record: MachineRecord, *, whole: bool) -> tuple[Live, Taken, RestoreParts]:
        """Capture a running machine; return also what its children start from. Where the memory of its newest snapshot is
        at hand, only what changed since then is captured and stored, and the children map both; else (or `whole`) all."""
        driver, at_hand = self._parts.driver_of(record.driver), self._parts.at_hand
        maps = driver.capabilities.mapped_memory
        live = self._fleet.need(record.id)
        if maps and not whole and at_hand is not None and live.parent and live.template.ref is not None:
            below = await asyncio.to_thread(at_hand.find, live.parent, live.template.ref)
            if below is not None:
                parent = live.parent
                live, taken = await self._taker.capture(record, resume=True, whole_disk=True)
                if not taken.capture.parent:  # it holds all, for a reason of the driver's
                    return live, taken, _parts_of(live, taken, taken.capture.memory, mapped_capture(taken.capture))
                over = mapped_over(below, taken.capture) if taken.capture.parent == parent else None
                if over is not None:
                    return live, taken, _parts_of(live, taken, NO_PAGES, over)
                taken.capture.close()
        live, taken = await self._taker.capture(record, resume=True, whole=True)
        return (
            live,
            taken,
            _parts_of(live, taken, taken.capture.memory, mapped_capture(taken.capture) if maps else None),
        )

    async def _fork_live(
        self, record: MachineRecord, live: Live, taken: Taken, parts: RestoreParts, count: int, names: Sequence[str],
        session: str,
    ) -> list[MachineRecord]:  # fmt: skip
        if not taken.forkable:
            raise Unsupported(
                f"machine {record.name} cannot be forked: guestd did not freeze its workload", hint="try again"
            )
        storing = asyncio.create_task(
            self._taker.store(record, live, taken, why="fork", state=record.state), name="store-fork"
        )
        children: list[MachineRecord] = []
        try:
            children = await self._children(record, Origin(live.template, parts, live.parent), count, names, session)
            row = await storing
        except UNDO:
            await finish(self._undo(storing, children))
            raise
        for number, child in enumerate(children):
            note = {**child.meta, "parent": row.id, "origin": {"snapshot": row.id, "machine": record.id}}
            children[number] = await self._parts.catalog.machines.update(child.id, meta=note)
            own = self._fleet.find(child.id)
            if own is not None:
                own.parent = row.id
                with contextlib.suppress(RecessError):
                    await own.vm.committed(None, row.id)
        return children

    async def _undo(self, storing: asyncio.Task[SnapshotRow], children: list[MachineRecord]) -> None:
        await asyncio.wait({storing})
        await self._drop_all(children)

    async def _drop_all(self, children: Sequence[MachineRecord]) -> None:
        for child in children:
            async with self._fleet.lock(child.id):
                await self._fleet.end(child.id, "its fork failed")
                await self._fleet.forget(child.id)

    async def _children(
        self, record: MachineRecord, origin: Origin, count: int, names: Sequence[str], session: str
    ) -> list[MachineRecord]:
        spec = child_spec(spec_from_json(record.spec, f"machine {record.id}"))
        room = asyncio.Semaphore(FORK_AT_ONCE)
        note: dict[str, Any] = {"origin": {"snapshot": origin.parent, "machine": record.id}}

        born: dict[int, MachineRecord] = {}

        async def one(number: int) -> None:
            name = names[number] if names else child_name(record.name, number + 1)
            child = await self._launcher.claim(spec, name=name, session=session, driver=record.driver, meta=note)
            async with room, self._fleet.lock(child.id):
                try:
                    child, _, _ = await self._launcher.launch(child, origin, epoch=0)
                except UNDO:
                    await self._launcher.abandon(child)
                    raise
            born[number] = child

        try:
            failed = [e for e in await asyncio.gather(*map(one, range(count)), return_exceptions=True) if e]
            if failed:
                raise failed[0]
        except UNDO:
            await finish(self._drop_all(list(born.values())))
            raise
        return [born[number] for number in range(count)]


def _parts_of(live: Live, taken: Taken, memory: PageSet, mapped: MappedMemory | None) -> RestoreParts:
    capture, how = taken.capture, "remap: its parent's pages" if mapped is not None else ""
    return RestoreParts(live.template.ref, memory, capture.disk, capture.vmstate, mapped=mapped, choice=how)


def _check_forkable(row: SnapshotRow) -> None:
    if not row.figures.get("forkable", True):
        raise Unsupported(
            f"snapshot {row.name or row.id[:16]} can only bring back its own machine: guestd did not answer when it "
            "was taken",
            hint="take another snapshot once the machine answers",
        )


def _why(record: MachineRecord, row: SnapshotRow, origin: Origin) -> str:
    if record.state == SUSPENDED and not record.status:
        where = "came from the remote store" if origin.fetched_bytes else "is on this node"
        return f"it was suspended; its snapshot {where}"
    if record.status:
        return f"{record.status}; restored from snapshot {row.id[:16]}"
    return f"restored from snapshot {row.id[:16]}"
