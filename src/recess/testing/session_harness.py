"""Machines that are folders and process groups of this host: the real agent process, the real protocol, no VM.

For tests of sessions and for users' offline tests of agents. A "machine" is a folder and the processes started in it;
freezing is SIGSTOP, and a snapshot is a copy of the folder. What this cannot do is bring back memory: the processes
of an evicted machine stay stopped and go on when *that* machine is resumed, while a restore from an older snapshot, or
a fork, has the files and no processes. No isolation whatever: run only code you trust.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recess.errors import IllegalState, NotFound
from recess.guestlink.link import IncomingHandler
from recess.ids import new_id
from recess.machines.service import MachineRow, MachineSpec, ResumeReport, SnapshotRow
from recess.plain.door import Door, SocketStream
from recess.testing.session_link import ProcessLink


async def _copy(source: Path, target: Path) -> None:
    """Copy a folder. Who is cancelled waits for the copy's end: none goes on behind the back of the next server."""
    copying = asyncio.ensure_future(asyncio.to_thread(shutil.copytree, source, target))
    try:
        await asyncio.shield(copying)
    except asyncio.CancelledError:
        await asyncio.wait({copying})
        raise


@dataclass
class ProcessMachine:
    """One machine: its folder, its link, its open session streams."""

    row: MachineRow
    folder: Path
    link: ProcessLink
    door: Door | None = None
    handlers: dict[str, IncomingHandler] = field(default_factory=dict)
    streams: set[SocketStream] = field(default_factory=set)
    accepted: int = 0  # streams so far
    dead: asyncio.Event = field(default_factory=asyncio.Event)
    epoch: int = 0


class ProcessMachines:
    """Implements `recess.machines.service.Machines` over folders below `root` (keep it short: unix sockets live there).
    `link` makes what runs a machine's programs."""

    def __init__(self, root: Path, link: Callable[[Path], ProcessLink] = ProcessLink) -> None:
        self.root = root
        self._link = link
        self.machines: dict[str, ProcessMachine] = {}
        self.snapshots: dict[str, SnapshotRow] = {}
        self.deadlines: dict[str, float | None] = {}
        self._keepers: dict[str, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._doors: list[Door] = []  # all there ever were: somebody may still talk to a server that is gone
        self.calls: list[tuple[str, str]] = []  # (method, machine or snapshot id), for tests
        self.fail_next: dict[str, Exception] = {}  # method -> raised once by its next call

    # -- Machines --------------------------------------------------------------------------------------------------

    async def create(self, spec: MachineSpec, *, name: str = "", session: str = "", epoch: int = 0) -> MachineRow:
        self._note("create", session)
        return (await self._make(new_id("mch"), spec, session, epoch)).row

    async def get(self, ref: str) -> MachineRow:
        return self._find(ref).row

    async def list_machines(self, *, everything: bool = False) -> list[MachineRow]:
        rows = [one.row for one in self.machines.values()]
        return [row for row in rows if everything or row.state in ("running", "paused")]

    async def link(self, machine_id: str) -> ProcessLink:
        machine = self._find(machine_id)
        if machine.row.state != "running":
            raise IllegalState(f"machine {machine_id} is {machine.row.state}")
        return machine.link

    async def pause(self, ref: str) -> None:
        machine = self._find(ref)
        self._note("pause", machine.row.id)
        machine.link.signal_all(signal.SIGSTOP)
        self._set(machine, state="paused")

    async def unpause(self, ref: str) -> None:
        machine = self._find(ref)
        self._note("unpause", machine.row.id)
        self._set(machine, state="running")
        machine.link.signal_all(signal.SIGCONT)

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
        machine = self._find(ref)
        self._note("snapshot", machine.row.id)
        if machine.row.state not in ("running", "paused"):
            raise IllegalState(f"machine {machine.row.id} is {machine.row.state}")
        before = machine.row.state
        machine.link.signal_all(signal.SIGSTOP)
        ident = new_id("snp")
        try:
            await _copy(machine.folder / "root", self.root / ident)
        except BaseException:
            # As the drivers' contract has it: after an error, or for a server that takes over from one that died in the
            # middle of a capture, a machine that ran before runs.
            if before == "running":
                machine.link.signal_all(signal.SIGCONT)
            raise
        row = SnapshotRow(
            id=ident, name=name, machine=machine.row.id, session=machine.row.session, log_position=log_position,
            epoch=epoch, why=why, created=0.0, template="", parent=machine.row.snapshot, figures={"new_bytes": 0},
        )  # fmt: skip
        self.snapshots[ident] = row
        self._set(machine, state="running" if resume else "paused", snapshot=ident)
        if resume:
            machine.link.signal_all(signal.SIGCONT)
        return row

    async def evict(self, ref: str, *, snapshot: str) -> None:
        machine = self._find(ref)
        self._note("evict", machine.row.id)
        if machine.row.state != "paused":
            raise IllegalState(f"machine {machine.row.id} is {machine.row.state}: cannot evict")
        await self._cut(machine)
        self.keeper_off(machine.row.id)
        self._set(machine, state="suspended", snapshot=snapshot)

    async def discard_snapshot(self, ref: str, snapshot: str) -> None:
        self._note("discard_snapshot", snapshot)
        machine, row = self._find(ref), self.snapshots.pop(snapshot)
        await asyncio.to_thread(shutil.rmtree, self.root / snapshot)
        if machine.row.snapshot == snapshot:
            self._set(machine, snapshot=row.parent)

    async def stored_snapshots(self, ids: Collection[str]) -> set[str]:
        return set(ids) & self.snapshots.keys()

    async def suspend(self, ref: str, *, why: str = "suspend") -> SnapshotRow:
        row = await self.snapshot(ref, why=why, resume=False)
        await self.evict(ref, snapshot=row.id)
        return row

    async def resume(self, ref: str, *, epoch: int = 0) -> ResumeReport:
        machine = self._find(ref)
        self._note("resume", machine.row.id)
        rung = {"paused": 1, "suspended": 2}.get(machine.row.state)
        if rung is None:
            raise IllegalState(f"machine {machine.row.id} is {machine.row.state}: cannot resume")
        machine.epoch = epoch
        self._set(machine, meta={**machine.row.meta, "epoch": epoch})
        if machine.door is None:
            self._listen(machine)
        self._set(machine, state="running")
        machine.link.signal_all(signal.SIGCONT)
        snapshot = machine.row.snapshot if rung == 2 else ""
        position = self.snapshots[snapshot].log_position if snapshot else 0
        return ResumeReport(rung=rung, why="", seconds=0.0, snapshot=snapshot, log_position=position)

    async def bring_back(
        self,
        ref: str,
        *,
        snapshots: Sequence[str] = (),
        rungs: Collection[int] = (1, 2, 3, 4),
        own_disk: bool = True,
        epoch: int = 0,
    ) -> ResumeReport:
        machine = self._find(ref)
        self._note("bring_back", machine.row.id)
        wanted = list(snapshots) or ([machine.row.snapshot] if machine.row.snapshot else [])
        if machine.row.state in ("running", "creating"):
            raise IllegalState(f"machine {machine.row.id} is {machine.row.state}: cannot bring back")
        if machine.row.state == "paused" and 1 in rungs:
            return await self.resume(ref, epoch=epoch)
        if 2 in rungs and wanted:
            return (await self.restore(wanted[0], session=machine.row.session, epoch=epoch, machine_id=ref))[1]
        if 4 in rungs and own_disk and machine.row.state == "dead":
            return await self._boot(machine, machine.folder / "root", epoch)
        if 4 in rungs and wanted:
            report = await self._boot(machine, self.root / wanted[0], epoch)
            return replace(report, snapshot=wanted[0], log_position=self.snapshots[wanted[0]].log_position)
        raise IllegalState(f"nothing is left of machine {machine.row.id}")

    async def _boot(self, machine: ProcessMachine, files: Path, epoch: int) -> ResumeReport:
        aside = self.root / new_id("dsk")
        await _copy(files, aside)
        row = machine.row
        made = await self._make(row.id, row.spec, row.session, epoch, files=aside)
        await asyncio.to_thread(shutil.rmtree, aside)
        self._set(made, snapshot=row.snapshot, name=row.name)
        return ResumeReport(rung=4, why="booted cold: files are kept, memory and processes are gone", seconds=0.0)

    async def reboot(self, ref: str, *, image: str = "", memory_bytes: int = 0, epoch: int = 0) -> ResumeReport:
        machine = self._find(ref)
        self._note("reboot", machine.row.id)
        spec = machine.row.spec
        spec = replace(spec, image=image or spec.image, memory_bytes=memory_bytes or spec.memory_bytes)
        await self.kill(ref, why="rebooted")
        self._set(machine, spec=spec)
        return await self._boot(machine, machine.folder / "root", epoch)

    async def restore(
        self,
        snapshot: str,
        *,
        name: str = "",
        session: str = "",
        epoch: int = 0,
        machine_id: str = "",
        disk_only: bool = False,
    ) -> tuple[MachineRow, ResumeReport]:
        self._note("restore", snapshot)
        row = self.snapshots.get(snapshot)
        if row is None:
            raise NotFound(f"no such snapshot: {snapshot}")
        spec = self._find(row.machine).row.spec
        if machine_id:
            await self.kill(machine_id, why="restored from a snapshot")
        machine = await self._make(machine_id or new_id("mch"), spec, session, epoch, files=self.root / snapshot)
        self._set(machine, snapshot=snapshot)
        report = ResumeReport(
            rung=4 if disk_only else 2, why="", seconds=0.0, snapshot=snapshot, log_position=row.log_position
        )
        return machine.row, report

    async def fork(self, ref: str, count: int = 1, *, names: Sequence[str] = (), session: str = "") -> list[MachineRow]:
        row = await self.snapshot(ref, why="fork")
        return [(await self.restore(row.id, session=session))[0] for _ in range(count)]

    async def stop(self, ref: str, *, timeout_s: float = 10.0) -> None:
        await self.kill(ref, why="stopped")

    async def kill(self, ref: str, *, why: str) -> None:
        machine = self._find(ref)
        self._note("kill", machine.row.id)
        self._set(machine, state="dead", status=why)
        self.keeper_off(machine.row.id)
        machine.link.signal_all(signal.SIGKILL)
        await self._cut(machine)
        await machine.link.reap()
        machine.dead.set()

    async def remove(self, ref: str, *, force: bool = False) -> str:
        machine = self._find(ref)
        await self.kill(ref, why="removed")
        del self.machines[machine.row.id]
        await asyncio.to_thread(shutil.rmtree, machine.folder, ignore_errors=True)
        return ""

    async def set_deadline(self, machine_id: str, seconds: float | None) -> None:
        self.deadlines[machine_id] = seconds
        self.keeper_off(machine_id)
        if seconds is not None:
            ends = asyncio.get_running_loop().call_later(seconds, self._keeper_ends, machine_id)
            self._keepers[machine_id] = ends

    async def wait_dead(self, machine_id: str) -> str:
        machine = self._find(machine_id)
        await machine.dead.wait()
        return machine.row.status

    def set_incoming(self, machine_id: str, service: str, handler: IncomingHandler | None) -> None:
        machine = self._find(machine_id)
        if handler is None:
            machine.handlers.pop(service, None)
        else:
            machine.handlers[service] = handler

    # -- for tests -------------------------------------------------------------------------------------------------

    def keeper_off(self, machine_id: str) -> None:
        """Let no deadline end this machine until the next one is set: its keeper stands still with the rest of its host."""
        timer = self._keepers.pop(machine_id, None)
        if timer is not None:
            timer.cancel()

    async def drop_streams(self) -> None:
        """Cut every open stream, as guestd does when a restarted server says hello."""
        for machine in self.machines.values():
            for stream in list(machine.streams):
                await stream.close()

    async def server_died(self) -> None:
        """What a server's death means here: its streams are cut."""
        await self.drop_streams()

    def end_processes(self, machine_id: str) -> None:
        """Kill what runs in a machine; the machine stays."""
        self.machines[machine_id].link.signal_all(signal.SIGKILL)

    def describe(self) -> list[str]:
        """Return each machine with what its processes printed, for a failed test's message."""
        return [f"{one.row.id} {one.row.state}: {one.link.outputs()}" for one in self.machines.values()]

    async def end(self) -> None:
        """Kill everything."""
        await self.close()

    async def close(self) -> None:
        """Kill everything."""
        for machine in list(self.machines.values()):
            await self.kill(machine.row.id, why="the harness ends")
        await asyncio.gather(*self._ending, *(door.empty() for door in self._doors))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _keeper_ends(self, machine_id: str) -> None:
        """The deadline has passed: by the keeper's own clock, whatever the server does or does not."""
        machine = self.machines.get(machine_id)
        if machine is not None and machine.row.state in ("running", "paused"):
            task = asyncio.create_task(self.kill(machine_id, why="its keeper's deadline has passed"))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _note(self, method: str, ident: str) -> None:
        self.calls.append((method, ident))
        failure = self.fail_next.pop(method, None)
        if failure is not None:
            raise failure

    def _find(self, ref: str) -> ProcessMachine:
        machine = self.machines.get(ref)
        if machine is None:
            raise NotFound(f"no such machine: {ref}")
        return machine

    def _set(self, machine: ProcessMachine, **changes: Any) -> None:
        machine.row = replace(machine.row, **changes)

    async def _make(
        self, ident: str, spec: MachineSpec, session: str, epoch: int, *, files: Path | None = None
    ) -> ProcessMachine:
        folder = self.root / ident[-8:]
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if files is None:
            (folder / "root").mkdir(parents=True)
        else:
            folder.mkdir(parents=True)
            await _copy(files, folder / "root")
        row = MachineRow(
            id=ident, name=ident, state="running", spec=spec, driver="process", template="", snapshot="",
            session=session, created=0.0, exit_code=None, status="",
            meta={"epoch": epoch},
        )  # fmt: skip
        machine = ProcessMachine(row, folder, self._link(folder), epoch=epoch)
        old = self.machines.get(ident)
        if old is not None:
            machine.handlers = old.handlers
            old.link.signal_all(signal.SIGKILL)  # one that was put away has stopped processes, which nobody would end
            await old.link.reap()
        self.machines[ident] = machine
        self._listen(machine)
        return machine

    def _listen(self, machine: ProcessMachine) -> None:
        async def talk(stream: SocketStream) -> None:
            machine.accepted += 1
            handler = machine.handlers.get("session")
            if handler is None or machine.row.state != "running":
                return
            machine.streams.add(stream)
            try:
                await handler("session", {}, stream)
            finally:
                machine.streams.discard(stream)

        machine.door = Door(machine.folder / "session.sock", talk)
        self._doors.append(machine.door)

    async def _cut(self, machine: ProcessMachine) -> None:
        door, machine.door = machine.door, None
        if door is not None:
            door.close()
        for stream in list(machine.streams):
            await stream.close()
