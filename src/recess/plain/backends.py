"""Two `Machines` services as one: VMs and plain processes, told apart by the spec at creation and by the id later."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from recess.guestlink.link import GuestLink, IncomingHandler
from recess.machines.service import MachineRow, Machines, MachineSpec, ResumeReport, SnapshotRow
from recess.plain.machines import DRIVER, PlainMachines

LABEL = "backend"  # of a machine's spec: "process" asks for a plain one


class Backends:
    """See the module; every call is passed on."""

    def __init__(self, vms: Machines, plain: PlainMachines) -> None:
        self._vms = vms
        self._plain = plain

    def _of(self, ref: str) -> Machines:
        return self._plain if self._plain.has(ref) else self._vms

    async def create(self, spec: MachineSpec, *, name: str = "", session: str = "", epoch: int = 0) -> MachineRow:
        """See `Machines`."""
        where: Machines = self._plain if spec.labels.get(LABEL) == DRIVER else self._vms
        return await where.create(spec, name=name, session=session, epoch=epoch)

    async def get(self, ref: str) -> MachineRow:
        """See `Machines`."""
        return await self._of(ref).get(ref)

    async def list_machines(self, *, everything: bool = False) -> list[MachineRow]:
        """See `Machines`."""
        return [
            *await self._vms.list_machines(everything=everything), *await self._plain.list_machines(everything=everything)
        ]  # fmt: skip

    async def link(self, machine_id: str) -> GuestLink:
        """See `Machines`."""
        return await self._of(machine_id).link(machine_id)

    async def pause(self, ref: str) -> None:
        """See `Machines`."""
        await self._of(ref).pause(ref)

    async def unpause(self, ref: str) -> None:
        """See `Machines`."""
        await self._of(ref).unpause(ref)

    async def snapshot(self, ref: str, **more: Any) -> SnapshotRow:
        """See `Machines`."""
        return await self._of(ref).snapshot(ref, **more)

    async def evict(self, ref: str, *, snapshot: str) -> None:
        """See `Machines`."""
        await self._of(ref).evict(ref, snapshot=snapshot)

    async def discard_snapshot(self, ref: str, snapshot: str) -> None:
        """See `Machines`."""
        await self._of(ref).discard_snapshot(ref, snapshot)

    async def stored_snapshots(self, ids: Collection[str]) -> set[str]:
        """See `Machines`."""
        return await self._vms.stored_snapshots(ids) | await self._plain.stored_snapshots(ids)

    async def suspend(self, ref: str, *, why: str = "suspend") -> SnapshotRow:
        """See `Machines`."""
        return await self._of(ref).suspend(ref, why=why)

    async def resume(self, ref: str, *, epoch: int = 0) -> ResumeReport:
        """See `Machines`."""
        return await self._of(ref).resume(ref, epoch=epoch)

    async def bring_back(self, ref: str, **more: Any) -> ResumeReport:
        """See `Machines`."""
        return await self._of(ref).bring_back(ref, **more)

    async def reboot(self, ref: str, **more: Any) -> ResumeReport:
        """See `Machines`."""
        return await self._of(ref).reboot(ref, **more)

    async def restore(self, snapshot: str, **more: Any) -> tuple[MachineRow, ResumeReport]:
        """See `Machines`."""
        where: Machines = self._plain if self._plain.has_snapshot(snapshot) else self._vms
        return await where.restore(snapshot, **more)

    async def fork(self, ref: str, count: int = 1, *, names: Sequence[str] = (), session: str = "") -> list[MachineRow]:
        """See `Machines`."""
        return await self._of(ref).fork(ref, count, names=names, session=session)

    async def stop(self, ref: str, *, timeout_s: float = 10.0) -> None:
        """See `Machines`."""
        await self._of(ref).stop(ref, timeout_s=timeout_s)

    async def kill(self, ref: str, *, why: str) -> None:
        """See `Machines`."""
        await self._of(ref).kill(ref, why=why)

    async def remove(self, ref: str, *, force: bool = False) -> str:
        """See `Machines`."""
        return await self._of(ref).remove(ref, force=force)

    async def set_deadline(self, machine_id: str, seconds: float | None) -> None:
        """See `Machines`."""
        await self._of(machine_id).set_deadline(machine_id, seconds)

    async def wait_dead(self, machine_id: str) -> str:
        """See `Machines`."""
        return await self._of(machine_id).wait_dead(machine_id)

    def set_incoming(self, machine_id: str, service: str, handler: IncomingHandler | None) -> None:
        """See `Machines`."""
        self._of(machine_id).set_incoming(machine_id, service, handler)
