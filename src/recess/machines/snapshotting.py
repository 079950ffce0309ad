"""Taking snapshots and putting machines away: what a machine's own snapshots mean for its row.

On any failure (a full disk, a dying VMM, a silent guest) a machine that ran runs on, and the snapshot it had before
stays its newest. A snapshot is durable in the store before its row exists; the row and the machine's new state are
written in one transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol

from recess.catalog.machines import MachineRecord
from recess.catalog.machines import update_in as update_machine_in
from recess.catalog.names import check_name
from recess.catalog.snapshots import SnapshotRecord
from recess.catalog.snapshots import insert_in as insert_snapshot_in
from recess.crashpoints import crash_point
from recess.db import Tx
from recess.errors import Corrupt, GuestFailed, IllegalState, Incompatible, NotFound, RecessError, Timeout
from recess.machines import keptdisk
from recess.machines.capture import Taken, drop_nameless, figures, snapshot_meta, store_capture, take
from recess.machines.emptying import drop_caches, should_drop
from recess.machines.fleet import Fleet
from recess.machines.live import Live
from recess.machines.mapped import MEMORY
from recess.machines.parts import UNDO, Parts
from recess.machines.records import snapshot_row
from recess.machines.service import SnapshotRow
from recess.machines.starting import finish
from recess.machines.states import PAUSED, RUNNING, next_state
from recess.machines.templates import vm_json
from recess.paging.firstpages import FIRST, decode_first, encode_first


class MakeRoom(Protocol):
    """Prunes when space is short; raises OutOfSpace if that is not enough, with `refuse`."""

    def __call__(self, *, refuse: bool) -> Awaitable[None]:
        """See `SnapshotKeeping.make_room`."""
        ...


class SnapshotTaker:
    """Snapshots of machines that have a VM. Every call expects the machine's lock to be held."""

    def __init__(self, parts: Parts, fleet: Fleet, make_room: MakeRoom) -> None:
        self._parts = parts
        self._fleet = fleet
        self._make_room = make_room

    async def capture(
        self, record: MachineRecord, *, resume: bool, refuse: bool = True, whole: bool = False, whole_disk: bool = False,
        idle_s: float | None = None,
    ) -> tuple[Live, Taken]:  # fmt: skip
        """Freeze and capture. `resume=False` leaves the machine paused. A machine that cannot wake is ended. `whole`:
        all that differs from the template, not only what changed since the newest snapshot; `whole_disk`: of the disk.

        Raises OutOfSpace before anything is touched when there is no room and `refuse`.
        """
        next_state(record.state, "snapshot", f"machine {record.name}")
        await self._make_room(refuse=refuse)
        live = self._fleet.need(record.id)
        go_on = resume and record.state == RUNNING
        idle_s = self._parts.clock.monotonic_s() - live.used_s if idle_s is None else idle_s
        runs = record.state == RUNNING and not live.workload_frozen
        if should_drop(self._parts.drop_caches, idle_s=idle_s, goes_on=resume, runs=runs):
            await drop_caches(live.link)
        parent = "" if whole else await self._usable_parent(live)
        try:
            with self._parts.store.giving_way():
                return live, await take(
                    live, self._parts.clock, resume=go_on, sync=not resume, parent=parent, disk_too=not whole_disk
                )
        except UNDO as exc:
            if live.workload_frozen and live.paused_since == 0.0:
                await finish(self._fleet.fail(live, f"guestd did not wake its workload after a capture: {exc}"))
            raise

    async def _usable_parent(self, live: Live) -> str:
        """Return the snapshot that a capture may count from: the newest, if it can still be read."""
        if not live.parent or not self._parts.driver_of(live.template.spec.driver).capabilities.dirty_tracking:
            return ""
        try:
            await asyncio.to_thread(self._parts.store.manifest, live.parent)
        except (Corrupt, NotFound, Incompatible):
            return ""
        return live.parent

    async def store(
        self,
        record: MachineRecord,
        live: Live,
        taken: Taken,
        *,
        name: str = "",
        why: str = "manual",
        log_position: int = 0,
        epoch: int = 0,
        state: str,
    ) -> SnapshotRow:
        """Write a capture durably, then its row together with the machine's (`state`, newest snapshot)."""
        clock, catalog = self._parts.clock, self._parts.catalog
        # What the capture counts from, whatever became of it since; else what its pages may be compared with.
        parent = taken.capture.parent or live.parent
        meta = snapshot_meta(
            taken,
            spec={
                "vm": vm_json(live.template.spec), "machine": dict(record.spec), "template": live.template.id,
                "driver_why": str(record.meta.get("driver_why", "")),
                **await asyncio.to_thread(self._first_pages, parent),
            },
            log_position=log_position, epoch=epoch, session=record.session, machine=record.id, why=why,
            origin={"parent": parent, "name": name}, created=clock.wall_s(),
        )  # fmt: skip
        report = await store_capture(self._parts.store, live, taken, meta, parent=parent)
        costs = figures(taken, report, clock.monotonic_s() - taken.began)
        costs = {**costs, "output": {str(k): v for k, v in self._fleet.starter.logged(record.id).items()}}
        row = SnapshotRecord(
            id=report.snapshot_id, name=name, machine=record.id, created=meta.created, session=record.session,
            log_position=log_position, epoch=epoch, why=why, template=live.template.id, parent=parent,
            figures=costs,
        )  # fmt: skip

        def write(tx: Tx) -> None:
            insert_snapshot_in(tx, row)
            changed = {**record.meta, "parent": row.id}
            update_machine_in(tx, record.id, snapshot=row.id, state=state, meta=changed)

        try:
            await catalog.db.write(write)
        except UNDO:
            await finish(self._drop_rowless(row.id))
            raise
        live.parent = row.id
        crash_point("machines.snapshot_row")
        # Last: should it not get through, the next capture holds more than it needs, never less.
        with contextlib.suppress(RecessError):
            await live.vm.committed(taken.capture, row.id)
        if self._parts.at_hand is not None:
            self._parts.at_hand.keep_capture(row.id, live.template.ref, taken.capture)
        return snapshot_row(row)

    def _first_pages(self, parent: str) -> dict[str, Any]:
        """Return for a manifest's spec what a machine of the parent touched first when it came back: what its child will
        touch, too. It travels with the snapshot; each child hands it on until somebody knows better."""
        if not parent:
            return {}
        known = encode_first(self._parts.first_pages(parent)) if self._parts.first_pages is not None else ""
        if not known:
            with contextlib.suppress(RecessError):
                hints = self._parts.store.manifest(parent)["spec"].get(FIRST)
                known = encode_first(decode_first(hints.get(MEMORY))) if isinstance(hints, dict) else ""
        return {FIRST: {MEMORY: known}} if known else {}

    async def _drop_rowless(self, snapshot_id: str) -> None:
        """After a row that failed: a cancelled write may have been done all the same, so look behind it in the queue."""
        catalog = self._parts.catalog
        if await catalog.db.write(lambda tx: catalog.snapshots.table.find_in(tx, snapshot_id)) is None:
            await drop_nameless(self._parts.store, snapshot_id)

    async def snapshot(
        self, record: MachineRecord, *, name: str, why: str, log_position: int, epoch: int, resume: bool,
        idle_s: float | None = None,
    ) -> SnapshotRow:  # fmt: skip
        """Capture and store; on an error the machine is as it was before."""
        if name:
            check_name(name, "snapshot", tagged=True)  # before anything costly; a name that is in use moves
        # A server that stops has no other way to keep its machines than to store them, short of space or not.
        live, taken = await self.capture(record, resume=resume, refuse=why != "stop", idle_s=idle_s)
        state = record.state if resume else PAUSED
        store = partial(
            self.store, record, live, name=name, why=why, log_position=log_position, epoch=epoch, state=state
        )
        try:
            try:
                return await store(taken)
            except (Corrupt, NotFound):
                if not taken.capture.parent:
                    raise
            # What the capture counts from has become unreadable: take one that stands alone.
            taken.capture.close()
            _, taken = await self.capture(record, resume=resume, refuse=why != "stop", whole=True)
            return await store(taken)
        except UNDO:
            if record.state == RUNNING and state == PAUSED:
                await finish(self.wake(live))
            raise
        finally:
            taken.capture.close()

    async def wake(self, live: Live) -> None:
        """Let a paused VM and its workload run. When the workload cannot be woken the machine is ended."""
        stood_still = self._parts.clock.monotonic_s() - live.paused_since if live.paused_since else 0.0
        try:
            await live.vm.unpause()
            live.paused_since = 0.0
            await live.wake(stood_still)
        except (GuestFailed, Timeout) as exc:
            await self._fleet.fail(live, f"guestd did not wake its workload: {exc.message}")
            raise

    async def evict(self, record: MachineRecord, snapshot: str) -> None:
        """End a paused machine whose snapshot is stored. The row says "suspended" before the VM goes, so that a crash
        in between leaves a stray VM (killed at the next start), never a machine that seems lost."""
        after = next_state(record.state, "evict", f"machine {record.name}")
        row = await self._parts.catalog.snapshots.get(snapshot)
        if row.machine != record.id:
            raise IllegalState(f"snapshot {row.id[:16]} is not one of machine {record.name}")
        await self._parts.catalog.machines.update(record.id, state=after, snapshot=row.id, status="")
        crash_point("machines.evicted")
        await self._fleet.end(record.id, "put away")
        keptdisk.drop(self._parts.directory(record.id))  # of an earlier end: the snapshot has it all

    async def suspend(self, record: MachineRecord, why: str) -> SnapshotRow:
        """Snapshot and evict, the machine's volumes exchanged before."""
        next_state(record.state, "suspend", f"machine {record.name}")
        if record.state == RUNNING:
            await self._fleet.mounting.give_back(self._fleet.need(record.id))
        row = await self.snapshot(record, name="", why=why, log_position=0, epoch=0, resume=False)
        await self.evict(await self._parts.catalog.machines.get(record.id), row.id)
        return row
