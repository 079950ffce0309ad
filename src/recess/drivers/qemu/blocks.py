"""The disk at a capture: which blocks the guest wrote since when, and the copy of them as of one instant.

What was written is in QEMU's dirty bitmaps on the disk's node; they live as long as the VM, whatever becomes of servers:

    since-start    since the VM was started; made before it first ran, never cleared, never removed
    since SNP      since the stored snapshot SNP was captured (the last one that was stored)
    after          since the last capture, which nobody has stored yet

A capture copies what `since SNP` names if its caller can build on SNP, else, over a template's disk, what `since-start` names:
with the blocks that a restore had put there, that is all in which this disk can differ from the template's. In the pause, in one
transaction, a new `after` begins, the list is put aside on the copy's own node (`changed`), and the copy begins. When the capture is stored (`commit`),
`after` becomes `since` that snapshot, again in one transaction.

*Why nothing is ever lost.* A bitmap that the guest's writes go into is never cleared: a capture that fails, is never stored or
is cut off by the death of the server leaves `since SNP` as if it had not been. A list may name too much, never too little:
where `since SNP` is missing (the VM came back from SNP, a commit did not get through, an earlier version's server) `since-start`
takes its place, which holds all that was written since, because SNP is of this VM's life, or what it was started from. Who
says that SNP is that, is the keeper (`Tracking.base`), for the memory and so for the disk: they count from the same
snapshot or the disk is whole. A bitmap that does not record is not used.

*Crash points.* qemu.disk_begun: in the pause, the copy has begun: `drop_copy` of the next server takes it back, `after` is
removed before the next capture begins. qemu.disk_commit: the keeper counts from the new snapshot, the disk does not:
`since-start` takes its place. qemu.disk_committed: both do.

*Why the copy waits.* QEMU's main loop does the copy's work before it answers the monitor: without a bound the command that
begins it took 48 to 390 ms for 128 MiB, and the guest stood still for it. So it begins at one byte a second and is let go
when the guest runs (2.6 to 3.9 ms, beside it on the same host). What the guest writes meanwhile is copied first, at any speed.

It must know nothing of memory, device state or what is done with the blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from recess.crashpoints import crash_point
from recess.drivers.kept import disk
from recess.drivers.kept.steps import in_thread
from recess.drivers.qemu.argv import DISK_NODE
from recess.drivers.qemu.handles import Handles, passed_file
from recess.drivers.qemu.nbd import dirty_blocks
from recess.drivers.qemu.qmp import Qmp, QmpRefused
from recess.errors import DriverFailed, OutOfSpace, RecessError, Timeout
from recess.units import PAGE_BYTES

SINCE_START, AFTER = "since-start", "after"
_CHANGED = "changed"
_JOB = _COPY_NODE = "capture"
_SOCKET = "blocks.sock"
_CBW_OPTION_SINCE = (10, 1)
_JOB_TIMEOUT_S = 600.0
_CANCEL_TIMEOUT_S = 10.0

Action = dict[str, Any]


def since(snapshot: str) -> str:
    """Return the name of the bitmap of what was written since this snapshot."""
    return f"since {snapshot}"


@dataclass(frozen=True)
class DiskPlan:
    """What is copied: the blocks of `bitmap`, some `bytes`. The others are the snapshot `parent`'s; "": as the VM found them at
    its start. `listed`: the capture's blocks are known by their numbers; else they are found by comparing the whole disk."""

    bitmap: str
    parent: str = ""
    bytes: int = 0
    listed: bool = False


def plan_disk(bitmaps: Mapping[str, int], parent: str, *, over_template: bool = False) -> DiskPlan:
    """Decide what a capture copies whose caller builds on the snapshot `parent` ("" on none), of which this VM's disk is
    known to be a successor. `bitmaps`: those that record, with the bytes that they name; `over_template`: what the VM found at
    its start is a template's disk, or was put over it. Pure."""
    name = since(parent) if parent and since(parent) in bitmaps else SINCE_START
    return DiskPlan(name, parent, bitmaps.get(name, 0), listed=bool(parent) or over_template)


def needless(bitmaps: Collection[str], base: str) -> list[Action]:
    """Return the removal of every bitmap that no later capture uses: all but those since the start and the base. Pure."""
    return [_removed(name) for name in sorted(bitmaps) if name not in (SINCE_START, since(base))]


def begun(plan: DiskPlan, *, counts: bool, version: tuple[int, int, int]) -> list[Action]:
    """Return what begins a capture's copy in the pause; `counts`: later captures may count from it. Pure."""
    job: Action = {"job-id": _JOB, "device": DISK_NODE, "target": _COPY_NODE, "speed": 1}
    # Never cleared: it goes on saying what was written, should this capture not be stored.
    job |= {"sync": "bitmap", "bitmap": plan.bitmap, "bitmap-mode": "never"}
    if version[:2] >= _CBW_OPTION_SINCE:
        job["on-cbw-error"] = "break-snapshot"
    actions: list[Action] = [_added(DISK_NODE, AFTER)] if counts else []
    if plan.listed:
        actions += [_added(_COPY_NODE, _CHANGED, disabled=True), _merged(_COPY_NODE, _CHANGED, plan.bitmap)]
    return [*actions, {"type": "blockdev-backup", "data": job}]


def stored(bitmaps: Collection[str], base: str, snapshot: str) -> list[Action]:
    """Return what makes the last capture the one that later ones count from: it is stored as `snapshot`. `base`: what was
    counted from before. Pure."""
    new = since(snapshot)
    if AFTER not in bitmaps or new in bitmaps:
        return []
    gone = [name for name in (AFTER, since(base)) if name in bitmaps]
    return [_added(DISK_NODE, new), _merged(DISK_NODE, new, AFTER), *map(_removed, gone)]


def _added(node: str, name: str, *, disabled: bool = False) -> Action:
    data = {"node": node, "name": name, "granularity": PAGE_BYTES, "disabled": disabled}
    return {"type": "block-dirty-bitmap-add", "data": data}


def _merged(node: str, name: str, source: str) -> Action:
    sources = [{"node": DISK_NODE, "name": source}]
    return {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": name, "bitmaps": sources}}


def _removed(name: str) -> Action:
    return {"type": "block-dirty-bitmap-remove", "data": {"node": DISK_NODE, "name": name}}


async def track_disk(qmp: Qmp) -> None:
    """Note every block the guest writes from now on. To be called before the VM runs for the first time."""
    await qmp.execute("block-dirty-bitmap-add", _added(DISK_NODE, SINCE_START)["data"])


async def find_bitmaps(qmp: Qmp) -> dict[str, int]:
    """Return the bitmaps of the disk that record, with the bytes that they name."""
    found = await _bitmaps_of(qmp, DISK_NODE)
    return {str(b["name"]): int(b["count"]) for b in found if b.get("name") and b.get("recording")}


async def _bitmaps_of(qmp: Qmp, node: str) -> list[dict[str, Any]]:
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    return [b for n in nodes if n["node-name"] == node for b in n.get("dirty-bitmaps", [])]


async def _names_any(qmp: Qmp, node: str, name: str) -> bool:
    """Tell whether a bitmap names any block; in doubt it does."""
    return all(b["count"] for b in await _bitmaps_of(qmp, node) if b.get("name") == name)


async def plan_copy(vm: Handles, parent: str) -> DiskPlan:
    """Decide what a capture copies, and drop what earlier ones left: from now on none of them can be committed."""
    vm.disk_after = 0
    bitmaps = await find_bitmaps(vm.qmp)
    await _transact(vm.qmp, needless(bitmaps, vm.tracking.base))
    if not vm.host.qemu.devices_command:  # such a disk is copied whole, in the pause
        return plan_disk(bitmaps, "")
    return plan_disk(bitmaps, parent, over_template=vm.journal.base == "template")


async def commit(vm: Handles, base: str, snapshot: str) -> None:
    """Have later captures count from the last one, which is stored as `snapshot`; `base`: what they counted from before."""
    vm.disk_after = 0
    crash_point("qemu.disk_commit")
    await _transact(vm.qmp, stored(await find_bitmaps(vm.qmp), base, snapshot))
    crash_point("qemu.disk_committed")


async def _transact(qmp: Qmp, actions: list[Action]) -> None:
    if actions:
        await qmp.execute("transaction", {"actions": actions})


class DiskCopy(Protocol):
    """A copy of the disk on its way."""

    async def start(self) -> None:
        """Begin; the VM is stopped."""

    async def finish(self) -> disk.Indices:
        """Wait for its end; the VM may run. Returns what the plan's bitmap named, if the plan is `listed`."""


class LiveCopy:
    """QEMU's copy-before-write: as of the pause, done after it."""

    def __init__(self, vm: Handles, plan: DiskPlan) -> None:
        self._vm = vm
        self._plan = plan
        self.ended = vm.qmp.expect("BLOCK_JOB_COMPLETED", lambda data: data.get("device") == _JOB)

    async def start(self) -> None:
        """Begin it, slowly."""
        vm = self._vm
        actions = begun(self._plan, counts=vm.tracking.exact, version=vm.host.qemu.version)
        await _transact(vm.qmp, actions)
        crash_point("qemu.disk_begun")

    async def finish(self) -> disk.Indices:
        """Let it go, and wait. Raises OutOfSpace, DriverFailed, Timeout."""
        with contextlib.suppress(QmpRefused):  # it has ended: there was nothing to copy
            await self._vm.qmp.execute("block-job-set-speed", {"device": _JOB, "speed": 0})
        try:
            async with asyncio.timeout(_JOB_TIMEOUT_S):
                data = await self.ended
        except TimeoutError as exc:
            raise Timeout(f"the disk was not copied within {_JOB_TIMEOUT_S:g} s") from exc
        if error := data.get("error"):
            if "No space" in error:
                raise OutOfSpace(f"no space left while copying the disk: {error}")
            raise DriverFailed(f"the disk could not be copied: {error}")
        return await self._changed() if self._plan.listed else disk.no_blocks()

    async def _changed(self) -> disk.Indices:
        """Ask QEMU what the bitmap named in the pause: a list that lies on the copy's node, out of the guest's way."""
        vm = self._vm
        if not await _names_any(vm.qmp, _COPY_NODE, _CHANGED):
            return disk.no_blocks()
        address = {"type": "unix", "data": {"path": _SOCKET}}  # QEMU's working folder is the run folder
        await vm.qmp.execute("nbd-server-start", {"addr": address, "max-connections": 1})
        export = {"type": "nbd", "id": _COPY_NODE, "node-name": _COPY_NODE, "name": _COPY_NODE, "bitmaps": [_CHANGED]}
        await vm.qmp.execute("block-export-add", export)
        size = vm.journal.spec.disk_bytes
        return await in_thread(dirty_blocks, vm.layout.run, _SOCKET, _COPY_NODE, _CHANGED, size)


@contextlib.asynccontextmanager
async def live_copy(vm: Handles, plan: DiskPlan, target: int) -> AsyncIterator[DiskCopy]:
    """Give the block a copy into `target`, of the disk's size; leaving the block gives up what is not finished."""
    async with passed_file(vm.qmp, target) as name:
        node = {"driver": "file", "node-name": _COPY_NODE, "filename": name, "locking": "off"}
        await vm.qmp.execute("blockdev-add", {**node, "cache": {"direct": False, "no-flush": True}})
        copy = LiveCopy(vm, plan)
        try:
            yield copy
        finally:
            copy.ended.cancel()
            await asyncio.shield(drop_copy(vm.qmp))


async def drop_copy(qmp: Qmp) -> None:
    """End the copy if it still runs, and drop its target. Whatever of it is not there is no error."""
    with contextlib.suppress(RecessError):
        cancelled = qmp.expect("BLOCK_JOB_CANCELLED", lambda data: data.get("device") == _JOB)
        try:
            await qmp.execute("block-job-cancel", {"device": _JOB, "force": True})
            await asyncio.wait([cancelled], timeout=_CANCEL_TIMEOUT_S)
        except QmpRefused:
            pass  # it has ended
        finally:
            cancelled.cancel()
    with contextlib.suppress(RecessError):
        await qmp.execute("nbd-server-stop")
    with contextlib.suppress(RecessError):
        await qmp.execute("blockdev-del", {"node-name": _COPY_NODE})
