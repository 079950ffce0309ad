"""One gVisor machine as the driver contract has it. Moves that change its state take turns; `kill` waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from recess.drivers.gvisor.capture import capture, export_template
from recess.drivers.gvisor.handles import Handles, end_machine, processes
from recess.drivers.gvisor.runsc import PAUSED, RUNNING
from recess.drivers.qemu.keeper import Process
from recess.errors import DriverFailed, IllegalState
from recess.guestlink.link import GuestLink
from recess.machines.contract import Capture, Hook, TemplateRef, VmStats

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class GvisorVm:
    """A running machine; see `recess.machines.contract.Vm`. `timings_s` says what its start took, step by step."""

    def __init__(self, handles: Handles) -> None:
        self.id = handles.layout.run.name
        self.timings_s = handles.timings_s
        self._handles = handles
        self._turn = asyncio.Lock()
        self._ending: asyncio.Task[None] | None = None

    @property
    def link(self) -> GuestLink:
        """The guest channel. Raises DriverFailed while there is none (a paused machine that was just adopted)."""
        return self._handles.port.link

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

    async def export_template(self, directory: Path) -> TemplateRef:
        """End this machine and leave a template's files."""
        if not self._handles.journal.for_template:
            raise IllegalState(f"machine {self.id} was not booted to become a template")
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
        await end_machine(vm.layout, vm.keeper, vm.family)
        with contextlib.suppress(Exception):
            await self.detach()
        with contextlib.suppress(OSError):
            vm.layout.remove_disks()

    async def detach(self) -> None:
        """Drop the connections and let the machine go on, for the next server to adopt."""
        await self._handles.port.close()
        self._handles.keeper.close()

    async def stalled(self) -> str:
        """Never: files are in the machine's memory, no write waits for the host's disk."""
        return ""

    async def wait_stalled(self) -> str:
        """Never return but with the machine's end, as DriverFailed."""
        end = await asyncio.shield(self._handles.keeper.death)
        raise DriverFailed(f"machine {self.id} is gone: {end.line()}", log=end.log)

    async def go_on(self) -> None:
        """Nothing is ever pending."""

    async def wait_dead(self) -> str:
        """Return when the machine is gone, with the reason."""
        return (await asyncio.shield(self._handles.keeper.death)).line()

    async def set_deadline(self, seconds: float | None) -> None:
        """Have the keeper kill it then, whatever becomes of this process."""
        await self._handles.keeper.deadline(seconds)

    def console_tail(self, limit: int = 65536) -> bytes:
        """Return the last bytes of what guestd has said, also of a machine that is gone."""
        try:
            with self._handles.layout.console.open("rb") as handle:
                handle.seek(max(0, handle.seek(0, os.SEEK_END) - limit))
                return handle.read(limit)
        except OSError:
            return b""

    async def stats(self) -> VmStats:
        """Return current numbers of all its processes; zeros once they are gone."""
        return await asyncio.to_thread(_stats, processes(self._handles.layout))


def _stats(family: Sequence[Process]) -> VmStats:
    pss = private = 0
    cpu_s = 0.0
    for pid in (process.pid for process in family):
        with contextlib.suppress(OSError):
            rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
            sizes = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
            pss += sizes.get("Pss", 0)
            private += sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return VmStats(pss_bytes=pss, cpu_s=cpu_s, private_bytes=private)
