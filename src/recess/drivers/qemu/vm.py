"""One QEMU VM as the driver contract has it. Moves that change its state take turns; `kill` waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from recess.drivers.qemu.capture import capture
from recess.drivers.qemu.handles import Handles, unless_dead
from recess.drivers.qemu.keeper import Process, end_vm, read_pids
from recess.drivers.qemu.template import export_template
from recess.errors import IllegalState
from recess.guestlink.link import GuestLink
from recess.machines.contract import Capture, Hook, TemplateRef, VmStats

_STALLED = "io-error"  # QEMU's run state after an error that stops the VM (qapi/run-state.json)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class QemuVm:
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
    ) -> Capture:
        """Take memory, disk and device state of one instant."""
        async with self._turn:
            return await capture(
                self._handles, resume=resume, before_pause=before_pause, after_resume=after_resume, parent=parent
            )

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Have the next captures count from this snapshot."""
        vm = self._handles
        if not vm.tracking.exact:
            return
        async with self._turn, vm.explain("commit"):
            await vm.keeper.committed(0 if capture is None else capture.generation, snapshot)
            _, base, _ = await vm.keeper.tracking()
            vm.tracking = dataclasses.replace(vm.tracking, base=base)

    def about_memory(self) -> Mapping[str, str]:
        """Say how its changes are known, and why so."""
        vm = self._handles
        pager = {} if vm.lazy is None else {f"pager_{key}": str(value) for key, value in vm.lazy.about().items()}
        tracking = {"tracking": vm.tracking.way, "tracking_why": vm.tracking.why, "base": vm.tracking.base}
        return {"start": vm.start, "memory": vm.memory, **tracking, **pager}

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
        await end_vm(vm.layout, vm.keeper)
        with contextlib.suppress(Exception):
            await vm.close()
        with contextlib.suppress(OSError):
            vm.layout.remove_disks()

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
        """Return current numbers of QEMU and its keeper; zeros once they are gone."""
        processes = list(read_pids(self._handles.layout).values())
        return await asyncio.to_thread(process_stats, processes)

    async def detach(self) -> None:
        """Drop the connections and let the VM go on, for the next server to adopt."""
        await self._handles.close()


def process_stats(processes: list[Process]) -> VmStats:
    """Return what these processes use together; those that are gone count nothing."""
    pss = private = 0
    cpu_s = 0.0
    for process in processes:
        with contextlib.suppress(OSError):
            if not process.alive():
                continue
            sizes = parse_smaps(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
            pss += sizes.get("Pss", 0)
            private += sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return VmStats(pss_bytes=pss, cpu_s=cpu_s, private_bytes=private)


def parse_smaps(text: str) -> dict[str, int]:
    """Return the sizes of /proc/PID/smaps_rollup in bytes, by name."""
    words = (line.split() for line in text.splitlines())
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}
