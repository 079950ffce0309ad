"""One Firecracker VM as the driver contract has it. Moves that change its state take turns; `kill` waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from recess.drivers.firecracker import calls, ledger
from recess.drivers.firecracker.capture import capture, export_template, let_run
from recess.drivers.firecracker.handles import Handles, end_machine, family, running
from recess.drivers.kept.keeper import Process
from recess.drivers.kept.steps import in_thread, unless_dead
from recess.drivers.kept.vm import KeptVm
from recess.machines.contract import Capture, Hook, TemplateRef


class FirecrackerVm(KeptVm[Handles]):
    """A running VM; see `recess.machines.contract.Vm`. `timings_s` says what its start took, step by step.
    It never stalls: Firecracker tells its guest of an error at once when the host's disk is full."""

    async def pause(self) -> None:
        """Stop the vCPUs. The channel is taken away before: a stopped guest could not let go of it, at a capture."""
        vm = self._handles
        async with self._turn, vm.explain("pause"):
            if await running(vm):
                await unless_dead(vm.keeper, "pause", vm.port.leave())
                await vm.api.call(calls.pause())
                vm.reset = False

    async def unpause(self) -> None:
        """Let the vCPUs run; the link is connected when this returns."""
        vm = self._handles
        async with self._turn, vm.explain("unpause"):
            await let_run(vm)
            await unless_dead(vm.keeper, "unpause", vm.port.attach())

    async def capture(
        self,
        *,
        resume: bool,
        before_pause: Hook | None = None,
        after_resume: Hook | None = None,
        parent: str = "",
        disk_too: bool = False,
    ) -> Capture:
        """Take memory, disk and device state of one instant."""
        vm = self._handles
        async with self._turn:
            work = asyncio.ensure_future(
                capture(vm, resume=resume, before_pause=before_pause, after_resume=after_resume, parent=parent)
            )
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                if not work.cancelled() and work.exception() is None:
                    work.result().close()
                raise

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Have the next captures count from this snapshot."""
        vm = self._handles
        async with self._turn:
            generation = 0 if capture is None else capture.generation
            vm.ledger = ledger.committed(vm.ledger, generation, snapshot)
            await in_thread(ledger.write_ledger, vm.layout.run, vm.ledger)

    def about_memory(self) -> Mapping[str, str]:
        """Say how its changes are known."""
        vm = self._handles
        pager = {} if vm.lazy is None else {f"pager_{key}": str(value) for key, value in vm.lazy.about().items()}
        why = "Firecracker's own list, as the kernel keeps it"
        if ledger.is_poisoned(vm.layout.run):
            why = "the list of changes was lost with a failed capture: the next one takes everything"
        return {"memory": vm.memory, "tracking": "kvm", "tracking_why": why, "base": vm.ledger.base, **pager}

    async def _export(self, directory: Path) -> TemplateRef:
        return await export_template(self._handles, directory)

    def _processes(self) -> Iterable[Process]:
        return family(self._handles.layout)

    async def _end(self) -> None:
        vm = self._handles
        await end_machine(vm.layout, vm.keeper, vm.jail, vm.journal.group)
        with contextlib.suppress(Exception):
            await vm.close()
        await self._remove_disks()
        with contextlib.suppress(OSError):
            vm.clone.unlink(missing_ok=True)

    async def detach(self) -> None:
        """Drop the connections and let the VM go on, for the next server to adopt."""
        await self._handles.close()
