"""One QEMU VM as the driver contract has it. Moves that change its state take turns; `kill` waits for nobody."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from recess.drivers.kept.keeper import Process, end_vm, read_pids
from recess.drivers.kept.steps import unless_dead
from recess.drivers.kept.vm import KeptVm
from recess.drivers.qemu.blocks import commit
from recess.drivers.qemu.capture import capture
from recess.drivers.qemu.handles import Handles
from recess.drivers.qemu.template import export_template
from recess.machines.contract import Capture, Hook, TemplateRef

_STALLED = "io-error"  # QEMU's run state after an error that stops the VM (qapi/run-state.json)


class QemuVm(KeptVm[Handles]):
    """A running VM; see `recess.machines.contract.Vm`. `timings_s` says what its start took, step by step."""

    async def pause(self) -> None:
        """Stop the vCPUs."""
        async with self._turn, self._handles.explain("pause"):
            await self._handles.qmp.execute("stop")

    async def unpause(self) -> None:
        """Let the vCPUs run; the link is connected when this returns."""
        vm = self._handles
        async with self._turn, vm.explain("unpause"):
            vm.port.start()
            await vm.qmp.execute("cont")
            await unless_dead(vm.keeper, "unpause", vm.port.wait_connected())

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
        async with self._turn:
            return await capture(
                self._handles, resume=resume, before_pause=before_pause, after_resume=after_resume, parent=parent,
                disk_too=disk_too,
            )  # fmt: skip

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Have the next captures count from this snapshot."""
        vm = self._handles
        if not vm.tracking.exact:
            return
        async with self._turn, vm.explain("commit"):
            generation = 0 if capture is None else capture.generation
            await vm.keeper.committed(generation, snapshot)
            before, (_, base, _) = vm.tracking.base, await vm.keeper.tracking()
            vm.tracking = dataclasses.replace(vm.tracking, base=base)
            # The disk follows the memory, never the other way round. What the VM was started from (0) needs no bitmap of
            # its own: that since the start names what was written since.
            if base == snapshot and generation and generation == vm.disk_after:
                await commit(vm, before, snapshot)

    def about_memory(self) -> Mapping[str, str]:
        """Say how its changes are known, and why so."""
        vm = self._handles
        pager = {} if vm.lazy is None else {f"pager_{key}": str(value) for key, value in vm.lazy.about().items()}
        tracking = {"tracking": vm.tracking.way, "tracking_why": vm.tracking.why, "base": vm.tracking.base}
        return {"start": vm.start, "memory": vm.memory, **tracking, **pager}

    async def _export(self, directory: Path) -> TemplateRef:
        return await export_template(self._handles, directory)

    def _processes(self) -> Iterable[Process]:
        return read_pids(self._handles.layout).values()

    async def _end(self) -> None:
        vm = self._handles
        await end_vm(vm.layout, vm.keeper)
        with contextlib.suppress(Exception):
            await vm.close()
        await self._remove_disks()

    async def stalled(self) -> str:
        """Tell whether a full disk of the host has stopped the VM (QEMU's `werror=enospc`, its default for disks)."""
        status = (await self._handles.qmp.execute("query-status"))["status"]
        return "the host's disk is full" if status == _STALLED else ""

    async def wait_stalled(self) -> str:
        """Return when a full disk of the host has stopped the VM."""
        refused = self._handles.qmp.expect("BLOCK_IO_ERROR", lambda data: data.get("action") == "stop")
        try:
            # Asked after the event is awaited, so that none is missed; it tells of a stall before this server, too.
            now = await self.stalled()
            if now:
                return now
            data = await refused
        finally:
            refused.cancel()
        return "the host's disk is full" if data.get("nospace") else f"the host's disk fails: {data.get('reason', '?')}"

    async def go_on(self) -> None:
        """Let QEMU do the refused write again."""
        async with self._turn, self._handles.explain("go on"):
            if await self.stalled():
                await self._handles.qmp.execute("cont")

    async def detach(self) -> None:
        """Drop the connections and let the VM go on, for the next server to adopt."""
        await self._handles.close()
