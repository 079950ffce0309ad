"""What Docker's users do with a machine besides making and ending it: start it again, wait for its end, rename it, take it
back to a snapshot, signal its main process.

Crash-safe by the order of effects: a machine is put away whole (snapshot and row) before it goes back to an older snapshot,
so that a server that dies in between leaves it suspended as it was; a start that fails leaves the row as it was.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import replace
from typing import Final

from recess.catalog.machines import MachineRecord
from recess.catalog.once import Once
from recess.crashpoints import crash_point
from recess.errors import BadInput, Conflict, IllegalState, NotFound, RecessError, Refused, Unsupported
from recess.guestlink.link import TOKEN_PATH
from recess.machines.bringback import BringBack
from recess.machines.climbing import Climber
from recess.machines.exchange import Report
from recess.machines.fleet import Fleet
from recess.machines.identity import machine_of, mark_of
from recess.machines.ladder import RUNGS
from recess.machines.launching import Launcher
from recess.machines.parts import Parts
from recess.machines.records import check_spec, machine_row, spec_from_json, spec_to_json, vm_spec
from recess.machines.service import MachineRow, MachineSpec, ResumeReport, SnapshotRow
from recess.machines.snapshots import StoredSnapshots
from recess.machines.snapshotting import SnapshotTaker
from recess.machines.starting import template_origin
from recess.machines.states import CREATED, DEAD, EXITED, PAUSED, RUNNING, SUSPENDED, next_state
from recess.machines.templates import Templates
from recess.machines.trust import with_authority

EXIT_KILLED = 137
FRESH_RUNG = 5
FRESH_WHY = "started anew: this driver keeps files in memory, and they went with it"
_OVER: Final = (EXITED, DEAD, CREATED)


class Acts:
    """Acts on machines by reference; each takes the machine's lock itself."""

    def __init__(
        self, parts: Parts, fleet: Fleet, launcher: Launcher, templates: Templates, taker: SnapshotTaker, back: BringBack,
        climber: Climber, stored: StoredSnapshots,
    ) -> None:  # fmt: skip
        self._parts = parts
        self._fleet = fleet
        self._launcher = launcher
        self._templates = templates
        self._taker = taker
        self._back = back
        self._climber = climber
        self._stored = stored

    async def _record(self, ref: str) -> MachineRecord:
        return await self._parts.catalog.machines.get(ref)

    async def made(self, once: Once | None) -> MachineRow | None:
        """Return the machine that a call with this key has made, None if there was no such call. Raises KeyReused, Conflict
        when that machine has been removed since: another one is not what was asked for."""
        machine_id = await self._parts.catalog.once.machine_of(once) if once is not None else ""
        if once is None or not machine_id:
            return None
        record = await self._parts.catalog.machines.find(machine_id)
        if record is None:
            raise Conflict(
                f"machine {machine_id} was made with the key {once.key!r} and has been removed since",
                hint="a new machine takes a new key",
            )
        return machine_row(record)

    async def whose(self, token: str) -> MachineRow:
        """Return the machine whose token this is, as it lives now. Raises Refused: none of ours, of an earlier life, of a
        machine it was copied from, or of one that does not run."""
        machine_id = machine_of(token)
        record = await self._parts.catalog.machines.find(machine_id) if machine_id else None
        mark = str(record.meta.get("token", "")) if record is not None else ""
        if record is None or record.state not in (RUNNING, PAUSED) or not hmac.compare_digest(mark, mark_of(token)):
            raise Refused(
                "this is no token of a machine that runs here", hint=f"a machine finds its own in {TOKEN_PATH}"
            )
        return machine_row(record)

    async def prepare(self, spec: MachineSpec, *, name: str = "", once: Once | None = None) -> MachineRow:
        """Check a spec and claim a name for it, state created; nothing is started. Raises as `Machines.create`."""
        driver = self._parts.driver_of(spec.driver)
        check_spec(spec, driver.capabilities)
        spec = with_authority(await asyncio.to_thread(self._fleet.mounting.check, spec))
        boot = await self._parts.images.boot_files(spec.image)  # there is such an image
        await driver.fingerprint(vm_spec(spec, boot, driver.name))  # and a host that runs it
        return machine_row(
            await self._launcher.claim(
                spec,
                name=name,
                session="",
                state=CREATED,
                once=once,
                driver=driver.name,
                driver_why=self._parts.why_driver(spec.driver),
            )
        )

    async def start(self, ref: str) -> ResumeReport | None:
        """Start a machine that was never started, or whose main process has ended, which boots from its disk as it was
        left; a suspended one is resumed. None when it runs already, or has just been started for the first time."""
        record = await self._record(ref)
        async with self._fleet.lock(record.id):
            record = await self._record(record.id)
            if record.state == RUNNING:
                return None
            if record.state in (EXITED, DEAD, SUSPENDED):
                return await self._again(record)
            next_state(record.state, "start", f"machine {record.name}")
            await self._fresh(record)
            return None

    async def _fresh(self, record: MachineRecord, status: str = "") -> None:
        spec = spec_from_json(record.spec, f"machine {record.id}")
        boot = await self._parts.images.boot_files(spec.image)
        template = await self._templates.ensure(spec.image, vm_spec(spec, boot, record.driver))
        await self._launcher.launch(record, template_origin(template), epoch=0, fresh=True, status=status)

    async def _again(self, record: MachineRecord) -> ResumeReport:
        if record.state == SUSPENDED:
            return await self._climber.climb(record, snapshots=(), rungs=RUNGS, own_disk=True, epoch=0)
        if self._parts.driver_of(record.driver).capabilities.own_disk:
            return await self._climber.climb(record, snapshots=(), rungs=(4,), own_disk=True, epoch=0)
        began = self._parts.clock.monotonic_s()
        await self._fleet.end(record.id, "it is started again")
        await self._fresh(record, FRESH_WHY)
        return ResumeReport(FRESH_RUNG, FRESH_WHY, self._parts.clock.monotonic_s() - began)

    async def reboot(self, ref: str, *, image: str, memory_bytes: int, epoch: int) -> ResumeReport:
        """See `Machines.reboot`. State and spec change in one write before the VM is ended: a server that dies after it finds
        a machine that has exited, whose disk boots as its row says; one that dies before, a machine that runs as it was."""
        record = await self._record(ref)
        async with self._fleet.lock(record.id):
            record = await self._record(record.id)
            next_state(record.state, "use", f"machine {record.name}")
            can = self._parts.driver_of(record.driver).capabilities
            if not can.own_disk:
                raise Unsupported(f"the {record.driver} driver keeps files in memory: a reboot would lose them")
            was = spec_from_json(record.spec, f"machine {record.id}")
            spec = replace(was, image=image or was.image, memory_bytes=memory_bytes or was.memory_bytes)
            check_spec(spec, can)
            await self._parts.images.boot_files(spec.image)  # there is such an image
            live, meta = self._fleet.need(record.id), record.meta
            if spec.image != was.image:
                meta = {
                    name: value for name, value in meta.items() if name != "vm"
                }  # else its old root would be booted
            live.stopping = True
            await self._fleet.settle(live)
            record = await self._parts.catalog.machines.update(
                record.id, state=EXITED, exit_code=0, status="rebooted", spec=spec_to_json(spec), meta=meta
            )
            crash_point("machines.reboot_noted")
            self._parts.tell("stop", record.id, record.name, exit_code=0)
            await self._fleet.end(record.id, "rebooted", keep_disk=True)
            return await self._climber.climb(record, snapshots=(), rungs=(4,), own_disk=True, epoch=epoch)

    async def wait(self, ref: str) -> int:
        """Return the exit code of the main process once the machine's run is over (137: it was killed, or lost); at once
        if it is. A suspended machine's is not."""
        seen = self._parts.events.newest
        record = await self._record(ref)
        if record.state in _OVER:
            return _code(record)
        while True:
            for event in await self._parts.events.wait(seen):
                seen = event.number
                if event.id != record.id or event.action not in ("die", "stop", "kill", "lost", "destroy"):
                    continue
                if "exit_code" in event.details:
                    return int(event.details["exit_code"])
                now = await self._parts.catalog.machines.find(record.id)
                if now is None or now.state in _OVER:
                    return EXIT_KILLED if now is None else _code(now)

    async def rename(self, ref: str, name: str) -> MachineRow:
        """Give a machine another name; its hostname follows at its next thaw. Raises NameInUse, BadInput."""
        if not name:
            raise BadInput("a machine needs a name")
        record = await self._record(ref)
        async with self._fleet.lock(record.id):
            row = await self._parts.catalog.machines.update(record.id, name=name)
            live = self._fleet.find(record.id)
            if live is not None:
                live.thaw = self._fleet.starter.thaw_maker(row, live.epoch)
            self._parts.tell("rename", row.id, name, before=record.name)
        return machine_row(row)

    async def signal(self, ref: str, number: int) -> None:
        """Send a signal to the main process group. Raises IllegalState without one."""
        record = await self._record(ref)
        next_state(record.state, "use", f"machine {record.name}")
        live = self._fleet.need(record.id)
        if live.main is None or live.main.job is None:
            raise IllegalState(f"machine {record.name} has no main process", hint="recess kill ends the machine")
        await live.main.job.signal(number)
        self._parts.tell("signal", record.id, record.name, signal=number)

    async def sync(self, ref: str) -> list[Report]:
        """Exchange a running machine's volumes with the host now, those too that it has from its parent. Raises
        IllegalState without any."""
        record = await self._record(ref)
        async with self._fleet.lock(record.id):
            record = await self._record(record.id)
            next_state(record.state, "use", f"machine {record.name}")
            return await self._fleet.mounting.sync(self._fleet.need(record.id), record)

    async def rewind(self, ref: str, snapshot: str = "") -> tuple[SnapshotRow | None, ResumeReport]:
        """Take a machine back to one of its snapshots (default: its newest) under its own identity.

        What it is now is stored first (returned; None if it did not run), so that nothing is lost; if the older
        snapshot cannot be brought back, the machine is, as it was. Raises BadInput (another machine's snapshot).
        """
        record = await self._record(ref)
        if record.session:
            raise IllegalState(f"machine {record.name} belongs to a session", hint="recess session rewind moves both")
        async with self._fleet.lock(record.id):
            record = await self._record(record.id)
            row = await self._stored.get(snapshot or record.snapshot or _none(record))
            if row.machine != record.id and record.meta.get("origin", {}).get("snapshot") != row.id:
                raise BadInput(
                    f"snapshot {row.name or row.id[:16]} is not of machine {record.name}",
                    hint="recess restore makes a new machine from it",
                )
            kept = await self._taker.suspend(record, "rewind") if record.state in (RUNNING, PAUSED) else None
            crash_point("machines.rewind_put_away")
            record = await self._record(record.id)
            try:
                _, report = await self._back.restore_as(record, row, int(record.meta.get("epoch", 0)))
            except RecessError:
                if kept is not None:
                    await self._back.resume(record, int(record.meta.get("epoch", 0)))
                raise
            self._parts.tell("rewind", record.id, record.name, snapshot=row.id)
        return kept, replace(report, why=f"taken back to snapshot {row.name or row.id[:16]}")


def _code(record: MachineRecord) -> int:
    if record.exit_code is not None:
        return record.exit_code
    return EXIT_KILLED if record.state == DEAD else 0


def _none(record: MachineRecord) -> str:
    raise NotFound(f"machine {record.name} has no snapshot", hint="recess snapshots ls", kind="snapshot", ref="")
