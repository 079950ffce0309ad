"""A session's hand on its one machine: climb the ladder to get it, keep its deadline moving, notice its death, let go.

It must never know of turns, messages or the log: it takes a plan and answers with the rung that was reached.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from recess.crashpoints import crash_point
from recess.errors import (
    Corrupt,
    IllegalState,
    Incompatible,
    InvalidSpec,
    NotFound,
    OutOfSpace,
    RecessError,
    Unavailable,
    Unsupported,
)
from recess.guestlink.link import IncomingHandler
from recess.machines.service import MachineRow, MachineSpec, ResumeReport
from recess.sessions.decisions import Rung, WakePlan, keeper_deadline_s
from recess.sessions.deps import Deps
from recess.sessions.lease import Lease, LeaseGate

SERVICE = "session"
RETRIES_S = (0.2, 1.0, 3.0)
PING_S = 5.0


@dataclass(frozen=True)
class Reached:
    """The rung that was reached and what it took; `why` includes what failed on the way."""

    rung: Rung
    report: ResumeReport


class MachineHand:
    """See the module. `on_dead(reason)` is called once when a held machine dies by itself."""

    def __init__(
        self, deps: Deps, gate: LeaseGate, session: str, handler: IncomingHandler, on_dead: Callable[[str], None]
    ) -> None:
        self._deps = deps
        self._gate = gate
        self._session = session
        self._handler = handler
        self._on_dead = on_dead
        self._watcher: asyncio.Task[None] | None = None
        self._lease: Lease | None = None
        self._epochs: set[int] = set()
        self.machine_id = ""
        self.damage = ""  # why the machine that the session had cannot be used by its row, for the log
        self.alive = False

    async def look(self) -> MachineRow | None:
        """Return the machine's row, None if there is no such machine, or none that can be read.

        A damaged row is left to whoever mends the database or gives it up (`recess rm --force`). A VM that it may stand
        for does no harm meanwhile: the gate knows only machines that were taken, so it may not act outside; nobody answers
        its agent; and its keeper, whose deadline is not moved any more, ends it.
        """
        if not self.machine_id:
            return None
        try:
            return await self._deps.machines.get(self.machine_id)
        except NotFound:
            return None
        except Corrupt as exc:
            self.damage = f"its machine {self.machine_id} cannot be read: {exc.message}"
            self.machine_id = ""
            return None

    async def climb(self, plan: WakePlan, spec: MachineSpec, lease: Lease, epoch_before: int) -> Reached:
        """Try the plan's steps until one holds. Raises what the last one raised, or Unavailable when a step that may
        work later does not work now: losing a workspace to a passing fault would be worse than waiting."""
        row = await self.look()
        if plan.kill_first and row is not None:
            await self._deps.machines.kill(row.id, why=plan.why)
        reasons = [plan.why]
        failure: RecessError = Unavailable(f"session {self._session}: no way to get a machine")
        for rung, snapshot in plan.steps:
            try:
                report = await self._patiently(rung, snapshot, row, spec, lease.epoch, plan)
            except (Incompatible, Unsupported, Corrupt, NotFound, IllegalState) as exc:
                failure = exc
                reasons.append(f"{rung} failed: {exc.message}")
                continue
            crash_point("session.after_thaw")
            kept = rung is Rung.REATTACH or rung is Rung.UNPAUSE
            await self._take(lease, {epoch_before, lease.epoch, _thawed_under(row)} if kept else {lease.epoch})
            why = "; ".join(one for one in (*reasons, report.why) if one)
            return Reached(rung, replace(report, why=why))
        raise failure

    async def _patiently(
        self, rung: Rung, snapshot: str, row: MachineRow | None, spec: MachineSpec, epoch: int, plan: WakePlan
    ) -> ResumeReport:
        for delay in RETRIES_S:
            try:
                return await self._step(rung, snapshot, row, spec, epoch, plan)
            except Unavailable:
                if rung is Rung.REATTACH:  # it does not answer: then it is as good as dead
                    await self._deps.machines.kill(self.machine_id, why="does not answer its session")
                    raise IllegalState("the machine runs but does not answer") from None
                await self._deps.clock.sleep(delay)
        return await self._step(rung, snapshot, row, spec, epoch, plan)

    async def _step(
        self, rung: Rung, snapshot: str, row: MachineRow | None, spec: MachineSpec, epoch: int, plan: WakePlan
    ) -> ResumeReport:
        machines = self._deps.machines
        if self.machine_id and rung is not Rung.CREATE:
            # Before it runs again: the agent's reconnection must find us.
            machines.set_incoming(self.machine_id, SERVICE, self._handler)
        match rung:
            case Rung.REATTACH:
                seconds = await (await machines.link(self.machine_id)).ping(PING_S)
                return ResumeReport(rung=1, why="re-attached", seconds=seconds)
            case Rung.UNPAUSE | Rung.RESUME:
                return await machines.resume(self.machine_id, epoch=epoch)
            case Rung.RESTORE:
                ident = row.id if row is not None else ""
                made, report = await machines.restore(snapshot, session=self._session, epoch=epoch, machine_id=ident)
                self.machine_id = made.id
                return report
            case Rung.DISK if snapshot:
                made, report = await machines.restore(snapshot, session=self._session, epoch=epoch, disk_only=True)
                self.machine_id = made.id
                return report
            case Rung.DISK:
                return await machines.bring_back(
                    self.machine_id, snapshots=plan.disks, rungs=(4,), own_disk=plan.own_disk, epoch=epoch
                )
            case Rung.CREATE:
                started = self._deps.clock.monotonic_s()
                made = await machines.create(spec, session=self._session, epoch=epoch)
                old, self.machine_id = self.machine_id, made.id
                if old:
                    with contextlib.suppress(RecessError):
                        await machines.remove(old, force=True)
                return ResumeReport(rung=5, why="fresh machine", seconds=self._deps.clock.monotonic_s() - started)

    async def reboot(self, *, image: str = "", memory_bytes: int = 0) -> ResumeReport:
        """Boot the machine again from its own disk, with another image or more memory. After NotFound, Unsupported and
        InvalidSpec it runs on; after any other error it is not held any more."""
        lease = self._lease
        if lease is None or not self.alive:
            raise IllegalState(f"session {self._session} holds no machine")
        await self.let_go()
        try:
            report = await self._deps.machines.reboot(
                self.machine_id, image=image, memory_bytes=memory_bytes, epoch=lease.epoch
            )
        except (NotFound, Unsupported, InvalidSpec):
            await self._take(lease, self._epochs)
            raise
        await self._take(lease, {lease.epoch})
        return report

    async def _take(self, lease: Lease, epochs: set[int]) -> None:
        self._lease, self._epochs, self.alive = lease, epochs, True
        self._deps.machines.set_incoming(self.machine_id, SERVICE, self._handler)
        self._gate.admit(self.machine_id, lease, epochs)
        await self.renewed()
        self._watcher = asyncio.create_task(self._watch(self.machine_id), name=f"dead-{self.machine_id}")

    async def renewed(self) -> None:
        """Move the keeper's deadline with the lease."""
        if self._lease is None or not self.machine_id:
            return
        settings = self._deps.settings
        left = self._lease.left_s(self._deps.clock.monotonic_s())
        seconds = keeper_deadline_s(left, margin_s=0.0, embedded=settings.embedded, orphan_s=settings.orphan_s)
        await self._deps.machines.set_deadline(self.machine_id, seconds)

    async def _watch(self, machine_id: str) -> None:
        try:
            reason = await self._deps.machines.wait_dead(machine_id)
        except RecessError as exc:
            reason = exc.message
        if self.alive and machine_id == self.machine_id:
            self.alive = False
            self._gate.dismiss(machine_id)
            self._on_dead(reason)

    async def answers(self) -> bool:
        """Ping the guest. A machine that does not answer is ended: half a machine serves nobody."""
        if not self.alive:
            return False
        try:
            await (await self._deps.machines.link(self.machine_id)).ping(PING_S)
        except OutOfSpace:
            return True  # it stands still until the host's disk has room, and is whole
        except RecessError as exc:
            await self.kill(f"does not answer: {exc.message}")
            return False
        return True

    async def let_go(self) -> None:
        """Stop acting on the machine; it is left as it is. May be called twice."""
        self.alive = False
        if self.machine_id:
            self._gate.dismiss(self.machine_id)
        watcher, self._watcher = self._watcher, None
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def kill(self, why: str) -> None:
        """Let go and end the VM. Never raises: what cannot be reached here, the keeper ends at its deadline."""
        await self.let_go()
        if self.machine_id:
            with contextlib.suppress(RecessError):
                await self._deps.machines.kill(self.machine_id, why=why)


def _thawed_under(row: MachineRow | None) -> int:
    """Return the epoch under which a machine was let run last, which is what the broker knows it by: with every server that
    re-attaches to it, it lies one claim further back. 0 (nobody's) if its row does not say."""
    epoch = row.meta.get("epoch", 0) if row is not None else 0
    return epoch if isinstance(epoch, int) else 0
