"""`PlainMachines`: the `Machines` service over folders and process groups.

A machine is `ID/`: `row.json`, `root/` (its files), `jobs/` (see `jobs`); a snapshot is `snapshots/ID/` with `row.json` and
`root/`, a copy taken while the processes stand still. Crash safety: every file appears by rename, a snapshot's row last; a
folder without a row is nothing, and the next start removes it. A row that says `running` is believed if it was written in
this boot: the keepers have the processes. What is put away has no process any more; bringing it back is rung 4.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from recess.clock import Clock
from recess.errors import IllegalState, Incompatible, NotFound, OutOfSpace, RecessError, Unavailable, Unsupported
from recess.guestlink.link import ByteStream, IncomingHandler
from recess.ids import new_id
from recess.machines.outputlog import Piece, Said
from recess.machines.service import MachineRow, MachineSpec, ResumeReport, SnapshotRow
from recess.plain.door import Door, SocketStream
from recess.plain.keeper import put
from recess.plain.link import PlainLink

T = TypeVar("T")

DRIVER = "process"
REF_LEAST = 6  # characters that name a machine: "mch_" and two more
KEEP = 8  # newest snapshots of a machine that stay
NO_MEMORY = "a plain process keeps no memory"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Plain:
    """One machine as this server serves it."""

    row: MachineRow
    link: PlainLink
    door: Door | None = None
    handlers: dict[str, IncomingHandler] = field(default_factory=dict)
    streams: set[ByteStream] = field(default_factory=set)
    dead: asyncio.Event = field(default_factory=asyncio.Event)


class PlainMachines:
    """See the module. `sockets` must have a short path; `home` holds everything else."""

    def __init__(self, home: Path, sockets: Path, clock: Clock) -> None:
        self._home = home
        self._snapshots = home / "snapshots"
        self._sockets = sockets
        self._clock = clock
        self._boot = BOOT_ID.read_text().strip()
        self._machines: dict[str, Plain] = {}
        self._stored: dict[str, SnapshotRow] = {}
        for folder in (self._snapshots, sockets):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._load()

    def has(self, machine_id: str) -> bool:
        """Tell whether this machine is one of ours."""
        return machine_id in self._machines

    def resolve(self, ref: str) -> str:
        """Return the id that an id or an unambiguous beginning of one means, "" for none."""
        if ref in self._machines:
            return ref
        fitting = [one for one in self._machines if len(ref) >= REF_LEAST and one.startswith(ref)]
        return fitting[0] if len(fitting) == 1 else ""

    async def output(self, machine_id: str) -> Said:
        """Return the newest output of the agent's newest process, all of it as stdout and of unknown times."""
        processes = self._find(machine_id).link.processes
        agents = [one.job_id for one in processes.list() if one.label]
        data, total = await asyncio.to_thread(processes.tail, agents[-1]) if agents else (b"", 0)
        return Said([Piece(1, data)] if data else [], total, 0)

    def has_snapshot(self, snapshot: str) -> bool:
        """Tell whether this snapshot is one of ours."""
        return snapshot in self._stored

    # -- Machines ----------------------------------------------------------------------------------------------------

    async def create(self, spec: MachineSpec, *, name: str = "", session: str = "", epoch: int = 0) -> MachineRow:
        """Make an empty folder; returns a running machine without a process."""
        return self._make(new_id("mch"), spec, name, session).row

    async def get(self, ref: str) -> MachineRow:
        """Return one."""
        return self._find(ref).row

    async def list_machines(self, *, everything: bool = False) -> list[MachineRow]:
        """Return those that run (or all), newest first."""
        rows = sorted((one.row for one in self._machines.values()), key=lambda row: -row.created)
        return [row for row in rows if everything or row.state in ("running", "paused")]

    async def link(self, machine_id: str) -> PlainLink:
        """Return the link of a running machine."""
        machine = self._find(machine_id)
        self._want(machine, "use", "running")
        return machine.link

    async def pause(self, ref: str) -> None:
        """Stop its processes."""
        machine = self._find(ref)
        self._want(machine, "pause", "running")
        await machine.link.freeze()
        self._save(machine, state="paused")

    async def unpause(self, ref: str) -> None:
        """Let them go on."""
        machine = self._find(ref)
        self._want(machine, "unpause", "paused")
        self._save(machine, state="running")
        await machine.link.unfreeze()

    async def snapshot(
        self, ref: str, *, name: str = "", why: str = "manual", log_position: int = 0, epoch: int = 0, resume: bool = True,
        idle_s: float | None = None,
    ) -> SnapshotRow:  # fmt: skip
        """Copy its folder while its processes stand still. Raises OutOfSpace, Unavailable; it runs on then."""
        machine = self._find(ref)
        self._want(machine, "snapshot", "running", "paused")
        before, ident = machine.row.state, new_id("snp")
        began = self._clock.monotonic_s()
        await machine.link.freeze()
        try:
            await copy_tree(machine.link.path("/"), self._snapshots / ident / "root")
        except BaseException:
            shutil.rmtree(self._snapshots / ident, ignore_errors=True)
            if before == "running":
                await machine.link.unfreeze()
            raise
        row = SnapshotRow(
            id=ident, name=name, machine=machine.row.id, session=machine.row.session, log_position=log_position,
            epoch=epoch, why=why, created=self._clock.wall_s(), template="", parent=machine.row.snapshot,
            figures={"new_bytes": 0, "standstill_s": self._clock.monotonic_s() - began},
        )  # fmt: skip
        put(str(self._snapshots / ident / "row.json"), msgspec.json.encode(row).decode())
        self._stored[ident] = row
        self._save(machine, state="running" if resume else "paused", snapshot=ident)
        if resume:
            await machine.link.unfreeze()
        self._thin_out(machine.row.id)
        return row

    async def evict(self, ref: str, *, snapshot: str) -> None:
        """End the processes of a paused machine: its files stay."""
        machine = self._find(ref)
        self._want(machine, "evict", "paused")
        await self._end(machine)
        self._save(machine, state="suspended", snapshot=snapshot)

    async def discard_snapshot(self, ref: str, snapshot: str) -> None:
        """Take back a snapshot; one that is gone is left alone."""
        machine, row = self._find(ref), self._stored.get(snapshot)
        if row is None:
            return
        self._drop(snapshot)
        if machine.row.snapshot == snapshot:
            self._save(machine, snapshot=row.parent)

    async def stored_snapshots(self, ids: Collection[str]) -> set[str]:
        """Return those that are stored."""
        return set(ids) & self._stored.keys()

    async def suspend(self, ref: str, *, why: str = "suspend") -> SnapshotRow:
        """Snapshot and evict."""
        row = await self.snapshot(ref, why=why, resume=False)
        await self.evict(ref, snapshot=row.id)
        return row

    async def resume(self, ref: str, *, epoch: int = 0) -> ResumeReport:
        """Let a paused one go on. Raises Incompatible for one that was put away: that has no memory."""
        machine = self._find(ref)
        if machine.row.state != "paused":
            raise Incompatible(NO_MEMORY, hint="its folder is there: rung 4")
        await self.unpause(ref)
        return ResumeReport(rung=1, why="its processes were stopped", seconds=0.0)

    async def bring_back(
        self, ref: str, *, snapshots: Sequence[str] = (), rungs: Collection[int] = (1, 2, 3, 4), own_disk: bool = True,
        epoch: int = 0,
    ) -> ResumeReport:  # fmt: skip
        """Rung 1 or rung 4, there is nothing between: the machine's own folder if that is the newest, else a snapshot's."""
        machine, began = self._find(ref), self._clock.monotonic_s()
        if machine.row.state == "running":
            raise IllegalState(f"machine {ref} is running: cannot bring back")
        if machine.row.state == "paused" and 1 in rungs:
            return await self.resume(ref)
        wanted = [one for one in snapshots or (machine.row.snapshot,) if one in self._stored]
        own = own_disk and (machine.row.state != "suspended" or not wanted)
        if 4 not in rungs or not (own or wanted):
            raise IllegalState(f"nothing is left of machine {ref} that may be used")
        await self._end(machine)
        source = "" if own else wanted[0]
        if source and (machine.row.state != "suspended" or machine.row.snapshot != source):
            await self._put_back(machine, source)  # else its folder is just that snapshot's
        self._save(machine, state="running", status="")
        machine.dead.clear()
        position = self._stored[source].log_position if source else 0
        why = f"{NO_MEMORY}: its files are kept, a new process reads the log"
        return ResumeReport(4, why, self._clock.monotonic_s() - began, source, position)

    async def reboot(self, ref: str, *, image: str = "", memory_bytes: int = 0, epoch: int = 0) -> ResumeReport:
        """Not offered: there is no VM that could boot."""
        raise Unsupported("a plain process has this host's memory and files: it cannot be given others")

    async def restore(
        self, snapshot: str, *, name: str = "", session: str = "", epoch: int = 0, machine_id: str = "",
        disk_only: bool = False,
    ) -> tuple[MachineRow, ResumeReport]:  # fmt: skip
        """Make a machine with the files of a snapshot (`disk_only`). Raises Incompatible without: there is no memory."""
        stored = self._stored.get(snapshot)
        if stored is None:
            raise NotFound(f"no such snapshot: {snapshot}")
        if not disk_only:
            raise Incompatible(NO_MEMORY, hint="its files can be had: disk_only")
        began = self._clock.monotonic_s()
        if machine_id:
            report = await self.bring_back(machine_id, snapshots=[snapshot], rungs=(4,), own_disk=False)
            return self._find(machine_id).row, report
        machine = self._make(new_id("mch"), self._spec_of(stored), name, session)
        await self._put_back(machine, snapshot)
        self._save(machine, snapshot=snapshot)
        why = f"{NO_MEMORY}: the files of a snapshot, a new process reads the log"
        seconds = self._clock.monotonic_s() - began
        return machine.row, ResumeReport(4, why, seconds, snapshot, stored.log_position)

    async def fork(self, ref: str, count: int = 1, *, names: Sequence[str] = (), session: str = "") -> list[MachineRow]:
        """Not offered: fork the session."""
        raise Unsupported(f"{NO_MEMORY}, so it cannot be forked", hint="fork its session: log and files")

    async def stop(self, ref: str, *, timeout_s: float = 10.0) -> None:
        """End it."""
        await self.kill(ref, why="stopped")

    async def kill(self, ref: str, *, why: str) -> None:
        """End its processes; its files stay. May be called again."""
        machine = self._find(ref)
        await self._end(machine)
        self._save(machine, state="dead", status=why)
        machine.dead.set()

    async def remove(self, ref: str, *, force: bool = False) -> str:
        """Forget it (`force`: also one that runs); its snapshots stay."""
        machine = self._find(ref)
        if not force and machine.row.state in ("running", "paused"):
            raise IllegalState(f"machine {ref} is {machine.row.state}", hint="use force")
        await self.kill(ref, why="removed")
        del self._machines[machine.row.id]
        folder = self._home / machine.row.id
        (folder / "row.json").unlink(missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return ""

    async def set_deadline(self, machine_id: str, seconds: float | None) -> None:
        """Let the keepers end its processes unless this is called again in time."""
        until = None if seconds is None else self._clock.monotonic_s() + seconds
        self._find(machine_id).link.processes.set_deadline(until)

    async def wait_dead(self, machine_id: str) -> str:
        """Return the reason when it was ended."""
        machine = self._find(machine_id)
        await machine.dead.wait()
        return machine.row.status

    def set_incoming(self, machine_id: str, service: str, handler: IncomingHandler | None) -> None:
        """Route what its processes say at its door."""
        machine = self._find(machine_id)
        if handler is None:
            machine.handlers.pop(service, None)
            return
        machine.handlers[service] = handler
        if machine.door is None:
            machine.door = Door(self._socket(machine_id), lambda stream: self._talk(machine, stream))

    async def close(self) -> None:
        """Close the doors; processes go on under their keepers, for the next server."""
        for machine in self._machines.values():
            door, machine.door = machine.door, None
            if door is not None:
                await door.empty()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        for path in sorted(self._snapshots.iterdir()):
            row = _read(path / "row.json", SnapshotRow)
            if row is not None:
                self._stored[row.id] = row
            else:
                shutil.rmtree(path, ignore_errors=True)  # a copy that was cut off
        for path in sorted(self._home.glob("mch_*")):
            found = _read(path / "row.json", MachineRow)
            if found is None:
                shutil.rmtree(path, ignore_errors=True)  # being made or removed when its server died
                continue
            _finish_put_back(path)
            machine = self._machines[found.id] = Plain(found, PlainLink(path, self._socket(found.id)))
            if found.state in ("running", "paused") and found.meta.get("boot") != self._boot:
                self._save(machine, state="dead", status="the host was restarted")

    def _make(self, ident: str, spec: MachineSpec, name: str, session: str) -> Plain:
        folder = self._home / ident
        (folder / "root").mkdir(parents=True, mode=0o700)
        row = MachineRow(
            id=ident, name=name or ident, state="running", spec=spec, driver=DRIVER, template="", snapshot="",
            session=session, created=self._clock.wall_s(), exit_code=None, status="", meta={},
        )  # fmt: skip
        machine = self._machines[ident] = Plain(row, PlainLink(folder, self._socket(ident)))
        self._save(machine)
        return machine

    def _save(self, machine: Plain, **changes: Any) -> None:
        meta = {**machine.row.meta, "boot": self._boot}
        machine.row = replace(machine.row, meta=meta, **changes)
        try:
            put(str(self._home / machine.row.id / "row.json"), msgspec.json.encode(machine.row).decode())
        except OSError as exc:
            raise Unavailable(f"cannot write the row of machine {machine.row.id}: {exc.strerror}") from exc

    def _find(self, ref: str) -> Plain:
        found = self._machines.get(ref)
        if found is None:
            raise NotFound(f"no such machine: {ref}")
        return found

    @staticmethod
    def _want(machine: Plain, act: str, *states: str) -> None:
        if machine.row.state not in states:
            raise IllegalState(f"machine {machine.row.id} is {machine.row.state}: cannot {act}")

    def _socket(self, machine_id: str) -> Path:
        return self._sockets / f"{machine_id}.sock"

    def _spec_of(self, stored: SnapshotRow) -> MachineSpec:
        known = self._machines.get(stored.machine)
        return known.row.spec if known is not None else MachineSpec(labels={"backend": DRIVER})

    async def _talk(self, machine: Plain, stream: SocketStream) -> None:
        handler = machine.handlers.get("session")
        if handler is None or machine.row.state != "running":
            return
        machine.streams.add(stream)
        try:
            await handler("session", {}, stream)
        finally:
            machine.streams.discard(stream)

    async def _end(self, machine: Plain) -> None:
        door, machine.door = machine.door, None
        if door is not None:
            door.close()
        for stream in list(machine.streams):
            with contextlib.suppress(RecessError):
                await stream.close()
        machine.link.processes.set_deadline(None)
        await machine.link.processes.end_all()

    async def _put_back(self, machine: Plain, snapshot: str) -> None:
        """Give a machine the files of a snapshot, by two renames; a crash in between is mended when the next server loads it."""
        root, beside = self._home / machine.row.id / "root", self._home / machine.row.id / "root.new"
        await asyncio.to_thread(shutil.rmtree, beside, ignore_errors=True)
        await copy_tree(self._snapshots / snapshot / "root", beside)
        old = self._home / machine.row.id / "root.old"
        await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)
        root.rename(old)
        beside.rename(root)
        await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)

    def _drop(self, snapshot: str) -> None:
        del self._stored[snapshot]
        (self._snapshots / snapshot / "row.json").unlink(missing_ok=True)
        shutil.rmtree(self._snapshots / snapshot, ignore_errors=True)

    def _thin_out(self, machine_id: str) -> None:
        mine = sorted((one for one in self._stored.values() if one.machine == machine_id), key=lambda one: one.created)
        for one in mine[:-KEEP]:
            self._drop(one.id)


def _finish_put_back(folder: Path) -> None:
    """Mend a machine whose server died between the two renames of `_put_back`: the copy was whole by then."""
    root, beside = folder / "root", folder / "root.new"
    if not root.exists() and beside.exists():
        beside.rename(root)
    for left in (beside, folder / "root.old"):
        shutil.rmtree(left, ignore_errors=True)


async def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder with all it holds, by reflinks where the file system has them. Who is cancelled waits for its end.
    Raises OutOfSpace, Unavailable."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise Unavailable(f"cannot make {target.parent}: {exc.strerror}") from exc
    command = ["cp", "-a", "--reflink=auto", "--", str(source), str(target)]
    copying = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    talking = asyncio.ensure_future(copying.communicate())
    try:
        _, told = await asyncio.shield(talking)
    except asyncio.CancelledError:
        await asyncio.wait({talking})
        raise
    if copying.returncode:
        text = told.decode(errors="replace").strip()[-300:]
        error = OutOfSpace if "No space left" in text or "quota" in text else Unavailable
        raise error(f"cannot copy the files of a plain machine: {text}")


def _read(path: Path, kind: type[T]) -> T | None:
    """Return a row, None for one that is not there or is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError):
        return None
