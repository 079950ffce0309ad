"""One Firecracker VM as the driver contract has it. Moves that change its state take turns; `kill` waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from recess.drivers.firecracker import calls, ledger
from recess.drivers.firecracker.capture import capture, export_template, let_run
from recess.drivers.firecracker.handles import Handles, end_machine, family, running
from recess.drivers.qemu.handles import in_thread, unless_dead
from recess.drivers.qemu.vm import process_stats
from recess.errors import DriverFailed, IllegalState
from recess.guestlink.link import GuestLink
from recess.machines.contract import Capture, Hook, TemplateRef, VmStats


class FirecrackerVm:
    """A running VM; see `recess.machines.contract.Vm`. `timings_s` says what its start took, step by step."""

    def __init__(self, handles: Handles) -> None:
        self.id = handles.layout.run.name
        self.timings_s = handles.timings_s
        self._handles = handles
        self._turn = asyncio.Lock()
        self._ending: asyncio.Task[None] | None = None

    @property
    def link(self) -> GuestLink:
        """The guest channel. Raises DriverFailed while there is none (a paused VM that was just adopted)."""
        return self._handles.port.link

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

    async def export_template(self, directory: Path) -> TemplateRef:
        """End this VM and leave a template's files."""
        if not self._handles.journal.for_template:
            raise IllegalState(f"VM {self.id} was not booted to become a template")
        async with self._turn:
            ref = await export_template(self._handles, directory)
        await self.kill()
        return ref

    async def kill(self) -> None:
        """End it and remove what belongs to it, except the console. Never fails; goes on if the caller is cancelled."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        vm = self._handles
        await end_machine(vm.layout, vm.keeper, vm.jail)
        with contextlib.suppress(Exception):
            await vm.close()
        with contextlib.suppress(OSError):
            vm.layout.remove_disks()
            vm.clone.unlink(missing_ok=True)

    async def stalled(self) -> str:
        """Never: Firecracker tells its guest of an error at once when the host's disk is full; nothing is pending."""
        return ""

    async def wait_stalled(self) -> str:
        """Never return but with the VM's end, as DriverFailed."""
        end = await asyncio.shield(self._handles.keeper.death)
        raise DriverFailed(f"VM {self.id} is gone: {end.line()}", log=end.log)

    async def go_on(self) -> None:
        """Nothing is ever pending."""

    async def wait_dead(self) -> str:
        """Return when the VM is gone, with the reason."""
        return (await asyncio.shield(self._handles.keeper.death)).line()

    async def set_deadline(self, seconds: float | None) -> None:
        """Have the keeper kill the VM then, whatever becomes of this process."""
        await self._handles.keeper.deadline(seconds)

    def console_tail(self, limit: int = 65536) -> bytes:
        """Return the last bytes of the console, also of a VM that is gone."""
        try:
            with self._handles.layout.console.open("rb") as handle:
                handle.seek(max(0, handle.seek(0, os.SEEK_END) - limit))
                return handle.read(limit)
        except OSError:
            return b""

    async def stats(self) -> VmStats:
        """Return current numbers of Firecracker and its keeper; zeros once they are gone."""
        return await asyncio.to_thread(process_stats, family(self._handles.layout))

    async def detach(self) -> None:
        """Drop the connections and let the VM go on, for the next server to adopt."""
        await self._handles.close()
