"""Plain machines (`recess.plain`, the product's own) under the session tests' hands: cut, struck, and found again by a server
that starts anew. It must know nothing of sessions.
"""

from __future__ import annotations

from pathlib import Path

from recess.clock import SystemClock
from recess.errors import NotFound
from recess.plain.machines import Plain, PlainMachines


class PlainHarness(PlainMachines):
    """`PlainMachines` below `root` (keep it short: unix sockets live there)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "plain", root / "s", SystemClock())

    @property
    def machines(self) -> dict[str, Plain]:
        """All there are, by id."""
        return self._machines

    def end_processes(self, machine_id: str) -> None:
        """Kill what runs in a machine; the machine stays."""
        self._machines[machine_id].link.processes.signal(9)

    async def drop_streams(self) -> None:
        """Cut every open stream."""
        for machine in self._machines.values():
            for stream in list(machine.streams):
                await stream.close()

    async def server_died(self) -> None:
        """What the next server finds: the rows on the disk, and the processes that their keepers have."""
        await self.close()
        self._machines.clear()
        self._stored.clear()
        self._load()

    def describe(self) -> list[str]:
        """Return each machine with the end of its processes' output, for a failed test's message."""
        told = []
        for ident, machine in self._machines.items():
            jobs = machine.link.processes
            ends = [f"{one.job_id} ({one.exit_code}): {jobs.tail(one.job_id)[0][-2000:]!r}" for one in jobs.list()]
            told.append(f"{ident} {machine.row.state}: {'; '.join(ends)}")
        return told

    async def end(self) -> None:
        """Remove everything."""
        for ident in list(self._machines):
            try:
                await self.remove(ident, force=True)
            except NotFound:
                continue
        await self.close()
