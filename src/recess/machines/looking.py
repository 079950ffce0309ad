"""Looking into stored snapshots: what differs between two of them, and whether one really comes back.

Both bring a snapshot to life as a scratch machine that never runs its workload (`scratch`). The check is the answer to
"does it restore", which no hash of a blob gives: a restore for real, then a capture of the restored machine, compared page
by page with what was stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from recess.catalog.snapshots import SnapshotRecord
from recess.errors import BadInput, Corrupt, RecessError
from recess.machines.comparing import (
    GuestState,
    PageDiff,
    compare_files,
    compare_pages,
    compare_processes,
    look_at,
)
from recess.machines.mapped import DISK, MEMORY
from recess.machines.parts import Parts
from recess.machines.scratch import scratch_vm
from recess.machines.snapshots import StoredSnapshots
from recess.machines.starting import Origin
from recess.snapshots.contract import PageData, PartDiff

log = logging.getLogger(__name__)

# Measured: 70 to 90, whatever the machine's size; 259 on a host that is itself emulated, where those moments hold more ticks.
MOVED_PAGES = 512
MOVED_FRACTION = 0.02
LOST_PAGES = 16


def judge(memory: PageDiff, disk: PageDiff) -> str:
    """Return why a restored machine is not the one that was stored, or "".

    Between the restore and the look the guest's kernel and guestd have run for some milliseconds, the workload has not.
    So a little of the memory has moved on. What a broken restore looks like is different: pages that should be the
    machine's own are the template's still, or zeros; or a large part of the memory is something else.
    """
    for name, diff in (("memory", memory), ("disk", disk)):
        if diff.changed > max(MOVED_PAGES, int(diff.listed * MOVED_FRACTION)):
            return f"{diff.changed} of {diff.listed} pages of its {name} are not what was stored"
        if diff.reverted - diff.zeroed > LOST_PAGES:
            return f"{diff.reverted} pages of its {name} are the template's, not its own"
    return ""


class SnapshotLooks:
    """Comparisons and checks of a node's stored snapshots. One scratch machine at a time."""

    def __init__(self, parts: Parts, stored: StoredSnapshots) -> None:
        self._parts = parts
        self._stored = stored
        self._one = asyncio.Lock()

    async def diff(self, left: str, right: str) -> dict[str, Any]:
        """Return what changed from one snapshot to another: memory and disk in pages, files, processes.

        Raises NotFound, Corrupt, Incompatible; BadInput for machines of different sizes.
        """
        rows = [await self._parts.catalog.snapshots.get(ref) for ref in (left, right)]
        async with self._one:
            memory, disk = await self._compare(rows[0].id, rows[1].id)
            out: dict[str, Any] = {
                "left": rows[0].id, "right": rows[1].id, "memory": asdict(memory), "disk": asdict(disk),
                "files": None, "processes": None, "why_no_files": "",
            }  # fmt: skip
            silent = [row.id[:16] for row in rows if not row.figures.get("forkable", True)]
            if silent:
                out["why_no_files"] = f"guestd did not answer when {silent[0]} was taken: it cannot be asked now"
                return out
            states = [await self._state(row.id) for row in rows]  # one after the other: each may take much memory
        out["files"] = asdict(compare_files(states[0].files, states[1].files))
        out["processes"] = asdict(compare_processes(states[0].processes, states[1].processes))
        return out

    async def _compare(self, left: str, right: str) -> tuple[PartDiff, PartDiff]:
        """Compare memory and disk in the store: neither is ever whole in memory."""
        (mine, _), (theirs, _) = [await self._stored.stands_on(ref) for ref in (left, right)]
        if (mine.spec.memory_bytes, mine.spec.disk_bytes) != (theirs.spec.memory_bytes, theirs.spec.disk_bytes):
            raise BadInput("the snapshots are of machines with different memory or disk sizes: they cannot be compared")
        sources = [*mine.sources, *theirs.sources]
        memory, disk = [
            await asyncio.to_thread(
                self._parts.store.difference, left, right, part, templates=(mine.pages, theirs.pages), sources=sources
            )
            for part in (MEMORY, DISK)
        ]
        return memory, disk

    async def _state(self, snapshot_id: str) -> GuestState:
        origin, _, _ = await self._stored.open(snapshot_id, stored=True)
        async with scratch_vm(self._parts, origin) as vm:
            return await look_at(vm.link)

    async def check(self, ref: str) -> dict[str, Any]:
        """Restore a snapshot for real and compare it with what was stored; the outcome is noted in its figures.

        Raises Corrupt if it is not the same, Incompatible, NotFound, DriverFailed ...
        """
        row = await self._parts.catalog.snapshots.get(ref)
        try:
            found = await self._check(row)
        except RecessError as exc:
            await self._note(row.id, {"ok": False, "why": exc.message})
            raise
        await self._note(row.id, {"ok": True, **found})
        return found

    async def _check(self, row: SnapshotRecord) -> dict[str, Any]:
        began = self._parts.clock.monotonic_s()
        async with self._one:
            origin, _, _ = await self._stored.open(row.id, stored=True)
            async with scratch_vm(self._parts, origin) as vm:
                capture = await vm.capture(resume=False)
                try:
                    over = origin.template if capture.base == "template" else None
                    memory, disk = await asyncio.to_thread(
                        lambda: tuple(
                            compare_pages(
                                mine, theirs, _base(origin, part), _base(origin, part) if over else None, total
                            )
                            for part, mine, theirs, total in (
                                (MEMORY, origin.parts.memory, capture.memory, capture.memory_pages_total),
                                (DISK, origin.parts.disk, capture.disk, capture.disk_blocks_total),
                            )
                        )
                    )
                finally:
                    capture.close()
        why = judge(memory, disk)
        if why:
            raise Corrupt(f"snapshot {row.id[:16]} does not come back as it was: {why}", blob=row.id)
        took = self._parts.clock.monotonic_s() - began
        return {
            "pages": memory.listed, "equal": memory.listed - memory.changed, "moved_on": memory.changed,
            "lost": max(0, memory.reverted - memory.zeroed),
            "disk_blocks": disk.listed, "disk_moved_on": disk.changed, "seconds": round(took, 3),
        }  # fmt: skip

    async def _note(self, snapshot_id: str, outcome: Mapping[str, Any]) -> None:
        checked = {"at": self._parts.clock.wall_s(), **outcome}
        await self._parts.catalog.snapshots.change(
            snapshot_id, lambda row: {"figures": {**row.figures, "checked": checked}}
        )

    async def check_due(self) -> str:
        """Check one stored snapshot if the policy says that it is time: the one that was not checked for longest.

        Returns its id, "" if nothing was due. A failure is noted and logged, not raised: nobody waits for it.
        """
        every_s, now = self._parts.keeping.check_every_s, self._parts.clock.wall_s()
        rows = [row for row in await self._parts.catalog.snapshots.readable() if row.figures.get("forkable", True)]
        times = {row.id: checked_at(row) for row in rows}
        if not every_s or not rows or now - max(times.values()) < every_s:
            return ""
        chosen = min(rows, key=lambda row: (times[row.id], -row.created))
        try:
            await asyncio.to_thread(self._parts.store.verify, chosen.id)
            await self.check(chosen.id)
        except RecessError as exc:
            await self._note(chosen.id, {"ok": False, "why": exc.message})
            log.error("snapshot %s failed its check: %s", chosen.id[:16], exc.message)
        return chosen.id


def checked_at(row: SnapshotRecord) -> float:
    """Return when a snapshot was last restored for a check; 0.0: never."""
    checked = row.figures.get("checked")
    at = checked.get("at") if isinstance(checked, Mapping) else None
    return float(at) if isinstance(at, int | float) else 0.0


def _base(origin: Origin, part: str) -> PageData | None:
    pages = origin.template.pages
    return pages.part(part) if pages is not None else None
