"""One gVisor machine as the driver contract has it. Moves that change its state take turns; `kill` waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from recess.drivers.gvisor.capture import capture, export_template
from recess.drivers.gvisor.handles import Handles, end_machine, processes
from recess.drivers.gvisor.runsc import PAUSED, RUNNING
from recess.drivers.kept.keeper import Process
from recess.drivers.kept.vm import KeptVm
from recess.machines.contract import Capture, Hook, TemplateRef


class GvisorVm(KeptVm[Handles]):
    """A running machine; see `recess.machines.contract.Vm`. `timings_s` says what its start took, step by step.
    It never stalls: files are in its memory, no write waits for the host's disk."""

    async def pause(self) -> None:
        """Stop the machine's tasks. The relay is taken away before: a stopped one could not be, at a capture."""
        async with self._turn:
            vm = self._handles
            if vm.status() == RUNNING:
                await vm.port.leave()
                await vm.command("pause")

    async def unpause(self) -> None:
        """Let the tasks run; the link is connected when this returns."""
        async with self._turn:
            vm = self._handles
            if vm.status() == PAUSED:
                await vm.command("resume")
            await vm.port.attach()

    async def capture(
        self,
        *,
        resume: bool,
        before_pause: Hook | None = None,
        after_resume: Hook | None = None,
        parent: str = "",
        disk_too: bool = False,
    ) -> Capture:
        """Take everything of one instant. `parent` changes nothing: pages are compared by content."""
        async with self._turn:
            work = asyncio.ensure_future(
                capture(self._handles, resume=resume, before_pause=before_pause, after_resume=after_resume)
            )
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # an image cannot be called off, and takes a moment only
                if not work.cancelled() and work.exception() is None:
                    work.result().close()
                raise

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Nothing to note: the driver has no `dirty_tracking`."""

    def about_memory(self) -> Mapping[str, str]:
        """Say how its changes are known."""
        return {"tracking": "content", "tracking_why": "gVisor's images are compared page by page", "base": ""}

    async def _export(self, directory: Path) -> TemplateRef:
        return await export_template(self._handles, directory)

    def _processes(self) -> Iterable[Process]:
        return processes(self._handles.layout)

    async def _end(self) -> None:
        vm = self._handles
        await end_machine(vm.layout, vm.keeper, vm.family, vm.journal)
        with contextlib.suppress(Exception):
            await self.detach()
        await self._remove_disks()

    async def detach(self) -> None:
        """Drop the connections and let the machine go on, for the next server to adopt."""
        await self._handles.port.close()
        self._handles.keeper.close()
