"""The machines service: every act on a machine, each under the machine's lock, each checked against the state table.

It implements `recess.machines.service.Machines` over the parts it is given (driver, snapshot store, images, catalog,
broker). Effects are ordered so that a crash anywhere leaves a row that `recover` can read: a name is claimed by a row
in state "creating" before anything is started, a snapshot is durable before its row, a row says "suspended" before
its VM is ended. It must never know of the context log: a log position is a number here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from recess.catalog.machines import MachineRecord
from recess.catalog.once import Once
from recess.crashpoints import crash_point
from recess.errors import Corrupt, GuestFailed, RecessError, Timeout
from recess.guestlink.link import GuestLink, IncomingHandler
from recess.machines.acts import Acts
from recess.machines.bringback import BringBack
from recess.machines.climbing import Climber
from recess.machines.coldboot import ColdBoot
from recess.machines.fleet import Fleet
from recess.machines.idling import Idling, is_napping
from recess.machines.keeping import SnapshotKeeping
from recess.machines.ladder import RUNGS
from recess.machines.launching import Launcher
from recess.machines.letting import change_egress
from recess.machines.live import Live
from recess.machines.looking import SnapshotLooks
from recess.machines.mainjob import JOB_ID
from recess.machines.outputlog import Said, read_output
from recess.machines.parts import UNDO, Parts
from recess.machines.processes import Process, list_processes
from recess.machines.records import check_spec, damaged_machine, machine_row, shown_machine, vm_spec
from recess.machines.service import Changes, MachineRow, MachineSpec, ResumeReport, SnapshotRow
from recess.machines.siblings import Siblings
from recess.machines.snapshots import StoredSnapshots
from recess.machines.snapshotting import SnapshotTaker
from recess.machines.stalls import check_goes, hint_of
from recess.machines.starting import finish, template_origin
from recess.machines.states import CREATING, DAMAGED, DEAD, PAUSED, RUNNING, STALLED, WITH_VM, next_state
from recess.machines.templates import Templates
from recess.machines.trust import with_authority
from recess.machines.views import SnapshotViews

EXIT_KILLED = 137
STATS_S = 2.0


class Manager:
    """See the module. `recover` must run before anything else is asked of it, `close` ends its part."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.events = parts.events
        self.templates = Templates(parts)
        self.fleet = Fleet(parts, self.templates)
        self._launcher = Launcher(parts, self.fleet)
        self.keeping = SnapshotKeeping(parts, self.fleet)
        self._taker = SnapshotTaker(parts, self.fleet, self.keeping.make_room)
        self._stored = StoredSnapshots(parts, self.templates)
        self.views = SnapshotViews(parts, self.keeping)
        self.looks = SnapshotLooks(parts, self._stored)
        self._back = BringBack(parts, self.fleet, self._launcher, self._taker, self._stored)
        self._cold = ColdBoot(parts, self.fleet, self._launcher, self.templates)
        self._climber = Climber(parts, self.fleet, self._unpark, self._back, self._cold, self._stored)
        self.acts = Acts(
            parts, self.fleet, self._launcher, self.templates, self._taker, self._back, self._climber, self._stored
        )

        self.siblings = Siblings(parts, self.fleet)
        self.idling = Idling(
            parts, self.fleet, wake=lambda record: self._back.resume(record, int(record.meta.get("epoch", 0))),
            put_away=lambda record: self._taker.suspend(record, "idle"),
        )  # fmt: skip

    # --- reading -----------------------------------------------------------------------------------------------

    async def get(self, ref: str) -> MachineRow:
        """Return one machine."""
        return self._shown(machine_row(await self._record(ref)))

    def _shown(self, row: MachineRow) -> MachineRow:
        live = self.fleet.find(row.id)
        if live is None or not live.stalled or row.state != RUNNING:
            return row
        return replace(row, state=STALLED, status=live.stalled, meta={**row.meta, "hint": hint_of(self._parts)})

    async def list_machines(self, *, everything: bool = False) -> list[MachineRow]:
        """Return those that have a VM or wake by themselves (or all), newest first, and before them any whose row is damaged."""
        records, damaged = await self._parts.catalog.machines.survey()
        napping = {record.id for record in records if is_napping(record)}  # they serve whoever comes
        rows = [*map(damaged_machine, damaged), *map(shown_machine, records)]
        shown = rows if everything else [row for row in rows if row.state in (*WITH_VM, DAMAGED) or row.id in napping]
        return [self._shown(row) for row in shown]

    async def link(self, machine_id: str) -> GuestLink:
        """Return the guest link of a running machine (also of one whose main process has ended a moment ago)."""
        live = self.fleet.find(machine_id)
        if live is not None and live.paused_since == 0.0:
            check_goes(live, machine_id)
            live.used_s = self._parts.clock.monotonic_s()
            return live.link
        record = await self._record(machine_id)
        next_state(record.state, "use", f"machine {record.name}")
        return self.fleet.need(record.id).link

    async def stats(self, ref: str) -> dict[str, Any]:
        """Return numbers of the VM's processes and, when guestd answers in time, of the guest."""
        record = await self._record(ref)
        live = self.fleet.need(record.id)
        out: dict[str, Any] = asdict(await live.vm.stats())
        out["paging"] = dict(live.vm.about_memory())
        if live.paused_since == 0.0 and not live.stalled:
            try:
                async with asyncio.timeout(STATS_S):
                    out["guest"] = dict(await live.link.stats())
            except (TimeoutError, GuestFailed, Timeout):
                out["guest"] = None
        return out

    async def job(self, ref: str) -> str:
        """Return the id of the machine's main job, "" if it has none."""
        return JOB_ID if (await self.get(ref)).spec.argv else ""

    async def output(self, ref: str) -> Said:
        """Return what is kept of the main process's output; it outlives the VM."""
        record = await self._record(ref)
        return await asyncio.to_thread(read_output, self._parts.directory(record.id))

    async def processes(self, ref: str) -> list[Process]:
        """Return the processes of a running machine, by pid."""
        return await list_processes(await self.link((await self._record(ref)).id))

    async def console(self, ref: str) -> bytes:
        """Return the tail of the serial console of a machine that has a VM."""
        return self.fleet.need((await self._record(ref)).id).vm.console_tail()

    async def _record(self, ref: str) -> MachineRecord:
        return await self._parts.catalog.machines.get(ref)

    # --- life --------------------------------------------------------------------------------------------------

    async def create(
        self, spec: MachineSpec, *, name: str = "", session: str = "", epoch: int = 0, once: Once | None = None
    ) -> MachineRow:
        """Fork the image's template; returns a thawed, running machine. On an error nothing is left, no row either, and
        the call's key (`once`) may be used again."""
        driver = self._parts.driver_of(spec.driver)
        check_spec(spec, driver.capabilities)
        spec = with_authority(await asyncio.to_thread(self.fleet.mounting.check, spec))
        boot = await self._parts.images.boot_files(spec.image)
        record = await self._launcher.claim(
            spec, name=name, session=session, driver=driver.name, driver_why=self._parts.why_driver(spec.driver),
            once=once,
        )  # fmt: skip
        async with self.fleet.lock(record.id):
            try:
                template = await self.templates.ensure(spec.image, vm_spec(spec, boot, driver.name))
                record, _, _ = await self._launcher.launch(record, template_origin(template), epoch=epoch, fresh=True)
            except UNDO:
                await self._launcher.abandon(record)
                raise
        return machine_row(record)

    async def change_egress(self, ref: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> MachineRow:
        """Change what a machine may reach, at once; see `letting`."""
        return await change_egress(self._parts, self.fleet, ref, add=add, remove=remove)

    async def pause(self, ref: str) -> None:
        """Freeze the workload, then stop the vCPUs. If the guest does not freeze, it runs on and GuestFailed says so."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            after = next_state(record.state, "pause", f"machine {record.name}")
            live = self.fleet.need(record.id)
            await live.link.freeze(sync=True, timeout_s=10.0)
            live.workload_frozen = True
            try:
                await live.vm.pause()
                live.paused_since = self._parts.clock.monotonic_s()
                await self._parts.catalog.machines.update(record.id, state=after)
                self._parts.tell("pause", record.id, record.name)
            except UNDO:
                await finish(self._taker.wake(live))
                raise

    async def unpause(self, ref: str) -> None:
        """Let a paused machine run again, its clock set."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            await self._unpause(await self._record(record.id), epoch=None)

    async def _unpause(self, record: MachineRecord, *, epoch: int | None) -> None:
        after = next_state(record.state, "unpause", f"machine {record.name}")
        live = self.fleet.need(record.id)
        meta = record.meta
        if epoch is not None and epoch != live.epoch:
            self.fleet.starter.change_epoch(live, record, epoch)
            meta = {**meta, "epoch": epoch}
        await self._taker.wake(live)
        await self._parts.catalog.machines.update(record.id, state=after, meta=meta)
        self._parts.tell("unpause", record.id, record.name)

    async def stop(self, ref: str, *, timeout_s: float = 10.0) -> None:
        """SIGTERM the main process, wait, then end the VM: state exited. One that has exited may be stopped again."""
        record = await self._record(ref)
        live = self.fleet.find(record.id)
        code: int | None = None
        if live is not None:
            live.stopping = True
        if live is not None and record.state == RUNNING and not live.stalled:
            code = await self._terminate(live, timeout_s)
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            after = next_state(record.state, "stop", f"machine {record.name}")
            await self.fleet.close_doors(record.id)
            if record.state in (RUNNING, PAUSED):
                code = code if code is not None else (EXIT_KILLED if record.spec.get("argv") else 0)
                await self._parts.catalog.machines.update(
                    record.id, state=after, exit_code=code, status=f"stopped ({code})"
                )
                self._parts.tell("stop", record.id, record.name, exit_code=code)
            elif record.state != after:
                await self._parts.catalog.machines.update(record.id, state=after, status="stopped while suspended")
            if live is not None and self.fleet.find(record.id) is live:
                if record.state == RUNNING:
                    await self.fleet.mounting.give_back(live, at_rest=not live.spec.remove_on_exit)
                if not live.spec.remove_on_exit:
                    await self.fleet.settle(live)
            await self.fleet.end(record.id, "stopped", keep_disk=True)
            if live is not None and live.spec.remove_on_exit:
                await self.fleet.forget(record.id)

    async def _terminate(self, live: Live, timeout_s: float) -> int | None:
        if live.main is None or live.main.job is None:
            return None
        try:
            await live.main.job.signal(15)
            async with asyncio.timeout(timeout_s):
                return await live.main.job.wait()
        except (TimeoutError, RecessError):
            return None  # it does not listen: the VM is ended all the same

    async def kill(self, ref: str, *, why: str) -> None:
        """End the VM at once, whatever else is going on with it; state dead. A dead machine may be killed again."""
        record = await self._record(ref)
        if record.state != CREATING:
            await self.fleet.end(record.id, why, keep_disk=True)  # without the lock: what holds it fails quickly now
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            after = next_state(record.state, "kill", f"machine {record.name}")
            await self.fleet.close_doors(record.id)
            if record.state != DEAD:
                await self._parts.catalog.machines.update(record.id, state=after, status=why)
                self._parts.tell("kill", record.id, record.name, reason=why)
            await self.fleet.end(record.id, why, keep_disk=True)

    async def remove(self, ref: str, *, force: bool = False) -> str:
        """Forget a machine that does not run (with `force` end it first): its folder and row. Snapshots stay.

        Of one whose row is damaged the folder stays a while, and its path is returned ("" otherwise).
        """
        try:
            record = await self._record(ref)
        except Corrupt:
            return await self.fleet.give_up(await self._parts.catalog.machines.locate(ref), force=force)
        if force and record.state in (RUNNING, PAUSED):
            await self.fleet.note_removal(record.id)
            await self._last_exchange(record.id)
            await self.fleet.end(record.id, "removed")  # without the lock: what holds it fails quickly now
            crash_point("machines.remove_ended")
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            if not force:
                next_state(record.state, "remove", f"machine {record.name}")
            await self.fleet.end(record.id, "removed")
            await self.fleet.forget(record.id)
        return ""

    async def _last_exchange(self, machine_id: str) -> None:
        """What a machine has made in its volumes goes back before it is removed by force."""
        live = self.fleet.find(machine_id)
        if live is not None and any(not mount.held for mount in live.spec.volumes):
            async with self.fleet.lock(machine_id):
                await self.fleet.mounting.give_back(live)

    # --- snapshots ---------------------------------------------------------------------------------------------

    async def snapshot(
        self,
        ref: str,
        *,
        name: str = "",
        why: str = "manual",
        log_position: int = 0,
        epoch: int = 0,
        resume: bool = True,
        idle_s: float | None = None,
    ) -> SnapshotRow:
        """Take and store a snapshot; see `SnapshotTaker.snapshot`."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            row = await self._taker.snapshot(
                record, name=name, why=why, log_position=log_position, epoch=epoch, resume=resume, idle_s=idle_s
            )
            self._parts.tell("snapshot", record.id, record.name, snapshot=row.id, why=why)
            return row

    async def evict(self, ref: str, *, snapshot: str) -> None:
        """End the VM of a paused machine whose snapshot is stored: state suspended."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            await self._taker.evict(await self._record(record.id), snapshot)

    async def suspend(self, ref: str, *, why: str = "suspend") -> SnapshotRow:
        """Put a machine away under its identity."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            record = await self.idling.stay(await self._record(record.id))
            row = await self._taker.suspend(record, why)
            self._parts.tell("suspend", record.id, record.name, snapshot=row.id)
            return row

    async def resume(self, ref: str, *, epoch: int = 0) -> ResumeReport:
        """Bring back a paused (rung 1) or suspended machine (rung 2)."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            if record.state != PAUSED:
                return await self._back.resume(record, epoch)
            return await self._unpark(record, epoch)

    async def _unpark(self, record: MachineRecord, epoch: int) -> ResumeReport:
        began = self._parts.clock.monotonic_s()
        await self._unpause(record, epoch=epoch)
        return ResumeReport(1, "it was parked in memory", self._parts.clock.monotonic_s() - began)

    async def bring_back(
        self,
        ref: str,
        *,
        snapshots: Sequence[str] = (),
        rungs: Collection[int] = RUNGS,
        own_disk: bool = True,
        epoch: int = 0,
    ) -> ResumeReport:
        """Bring a machine back by the best of the allowed rungs that works; see `Machines.bring_back`."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            record = await self._record(record.id)
            return await self._climber.climb(record, snapshots=snapshots, rungs=rungs, own_disk=own_disk, epoch=epoch)

    async def reboot(self, ref: str, *, image: str = "", memory_bytes: int = 0, epoch: int = 0) -> ResumeReport:
        """Boot a running machine's own disk again, with another image or more memory; see `Acts.reboot`."""
        return await self.acts.reboot(ref, image=image, memory_bytes=memory_bytes, epoch=epoch)

    async def restore(
        self,
        snapshot: str,
        *,
        name: str = "",
        session: str = "",
        epoch: int = 0,
        machine_id: str = "",
        disk_only: bool = False,
        changes: Changes | None = None,
        once: Once | None = None,
    ) -> tuple[MachineRow, ResumeReport]:
        """Make a machine from a snapshot, or bring `machine_id` back from it under its own identity."""
        row = await self._stored.get(snapshot)
        if not machine_id:
            make = self._cold.new if disk_only else self._back.restore_new
            record, report = await make(row, name=name, session=session, epoch=epoch, changes=changes, once=once)
            return machine_row(record), report
        known = await self._record(machine_id)
        async with self.fleet.lock(known.id):
            known = await self._record(known.id)
            if disk_only:
                record, report = await self._cold.again(known, row, epoch=epoch)
            else:
                record, report = await self._back.restore_as(known, row, epoch)
        return machine_row(record), report

    async def fork(self, ref: str, count: int = 1, *, names: Sequence[str] = (), session: str = "") -> list[MachineRow]:
        """Make `count` children of a machine, each with an identity of its own; the parent goes on."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            children = await self._back.fork(await self._record(record.id), count, names, session)
        return [machine_row(child) for child in children]

    async def list_snapshots(self) -> list[SnapshotRow]:
        """Return all snapshots, newest first."""
        return await self._stored.list_all()

    async def get_snapshot(self, ref: str) -> SnapshotRow:
        """Return a snapshot by id, name or unambiguous id prefix."""
        return await self._stored.get(ref)

    async def discard_snapshot(self, ref: str, snapshot: str) -> None:
        """Take back a snapshot that came to nothing; see `SnapshotKeeping.cancel`."""
        record = await self._record(ref)
        async with self.fleet.lock(record.id):
            await self.keeping.cancel(record.id, snapshot)

    async def stored_snapshots(self, ids: Collection[str]) -> set[str]:
        """Return those of `ids` that are still there."""
        return set(ids).intersection(await self._parts.catalog.snapshots.all_ids())

    async def remove_snapshot(self, ref: str) -> None:
        """Forget a snapshot; HasDependents when something stands on it."""
        await self.keeping.remove(ref)

    async def verify_snapshot(self, ref: str) -> Mapping[str, Any]:
        """Re-hash a snapshot and its template; Corrupt names the blob."""
        return await self._stored.verify(ref)

    async def collect(self, **options: float) -> Mapping[str, int]:
        """Sweep blobs nobody needs; options as `SnapshotKeeping.collect`."""
        return await self.keeping.collect(**options)

    # --- watching ----------------------------------------------------------------------------------------------

    async def set_deadline(self, machine_id: str, seconds: float | None) -> None:
        """The keeper kills the VM unless this is called again in time."""
        await self.fleet.need(machine_id).vm.set_deadline(seconds)

    async def wait_dead(self, machine_id: str) -> str:
        """Return the reason when the VM is gone; at once if there is none."""
        live = self.fleet.find_going(machine_id)
        if live is None:
            return (await self._record(machine_id)).status or "it has no VM"
        await live.gone.wait()
        return live.reason

    def set_incoming(self, machine_id: str, service: str, handler: IncomingHandler | None) -> None:
        """Route streams that the guest opens for this service; survives link renewals."""
        self.fleet.incoming.set(machine_id, service, handler)

    # --- the server comes and goes -----------------------------------------------------------------------------

    async def tidy(self) -> Mapping[str, int]:
        """What a node does by itself now and then: snapshots by policy, blobs, folders of machines that are gone."""
        done = await self.keeping.tidy()
        await self.looks.check_due()
        return {**done, "folders": await self.fleet.leavings.sweep(at_start=False)}

    def templates_in_use(self) -> set[str]:
        """Return the ids of the templates that machines with a VM stem from."""
        return {live.template.id for live in self.fleet.all() if live.template.id}

    async def recover(self) -> dict[str, int]:
        """Take over what an earlier server left; returns counts: adopted, lost, unfinished, strays, damaged."""
        self.templates.sweep()
        counts = await self.fleet.recover()
        await self.templates.evict(self.templates_in_use())
        await self.idling.recover()
        return counts

    async def close(self, *, detach: bool = True) -> None:
        """Let go of the VMs (`detach`: they run on for the next server) or put every machine away first."""
        if not detach:
            await asyncio.gather(*(self._put_away(live.id) for live in self.fleet.all()), return_exceptions=True)
        await self.idling.close()
        await self.fleet.detach()

    async def _put_away(self, machine_id: str) -> None:
        try:
            await self.suspend(machine_id, why="stop")
        except RecessError as exc:
            await self.kill(machine_id, why=f"the server stopped and it could not be put away: {exc.message}")
