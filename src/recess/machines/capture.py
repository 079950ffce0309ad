"""One snapshot's way from a running machine to durable bytes: freeze, capture, wake, compress and store.

    freeze the workload (guestd)   -- bounded; if guestd is silent the snapshot is taken all the same, marked unforkable
    capture (driver)               -- the pause
    wake the workload              -- only here the standstill ends; compression has not begun
    write (store, in a thread)     -- manifest fsynced last; on any error nothing is visible and the machine is unharmed

The row is written by the caller afterwards: a crash before it leaves a manifest that no row names, which the garbage
collector sweeps; the machine's earlier snapshot stays its newest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recess.clock import Clock
from recess.crashpoints import crash_point
from recess.errors import GuestFailed, Timeout
from recess.machines.contract import Capture
from recess.machines.live import Live
from recess.machines.mapped import capture_parts
from recess.machines.parts import UNDO
from recess.machines.templates import fingerprint_json
from recess.snapshots.contract import SnapshotMeta, SnapshotStore, WriteReport

FREEZE_S = 2.0
SYNC_FREEZE_S = 10.0


@dataclass
class Taken:
    """A capture and what it cost the guest. Seconds; `began` is monotonic."""

    capture: Capture
    forkable: bool
    began: float
    freezer_s: float  # the workload's standstill; with `sync` without the freeze call, which holds the syncfs
    timings_s: dict[str, float]


async def take(live: Live, clock: Clock, *, resume: bool, sync: bool) -> Taken:
    """Freeze, capture and (with `resume`) wake. On an error a machine that ran runs again.

    Raises DriverFailed, OutOfSpace, Unsupported; GuestFailed or Timeout when the workload could not be woken: then
    the caller must end the machine, it is not served half-awake.
    """
    began = clock.monotonic_s()
    forkable, was_frozen = True, live.workload_frozen
    if not was_frozen and live.paused_since == 0.0:
        try:
            await live.link.freeze(sync=sync, timeout_s=SYNC_FREEZE_S if sync else FREEZE_S)
            live.workload_frozen = True
        except (GuestFailed, Timeout):
            forkable = False
    still = clock.monotonic_s()
    try:
        capture = await live.vm.capture(resume=resume)
    except UNDO:
        if live.workload_frozen and not was_frozen:
            await live.wake(clock.monotonic_s() - still)
        raise
    captured = clock.monotonic_s()
    try:
        if resume and live.workload_frozen:
            await live.wake(capture.standstill_s)
    except UNDO:
        capture.close()
        raise
    woken = clock.monotonic_s()
    if not resume and live.paused_since == 0.0:
        live.paused_since = captured
    timings = {f"capture.{k}": v for k, v in capture.timings_s.items()}
    timings |= {"freeze": still - began, "capture": captured - still, "wake": woken - captured}
    return Taken(capture, forkable, began, woken - (still if sync else began), timings)


async def store_capture(
    store: SnapshotStore, live: Live, taken: Taken, meta: SnapshotMeta, *, parent: str
) -> WriteReport:
    """Write a capture in a thread and return when it is durable. The capture's buffers outlive the thread whatever
    happens to the caller: a cancelled caller still waits for the write to end before the buffers go."""
    use_template = taken.capture.base == "template"
    work = asyncio.create_task(
        asyncio.to_thread(
            lambda: store.write(
                capture_parts(taken.capture),
                taken.capture.vmstate,
                meta,
                template=live.template.pages if use_template else None,
                parent_id=parent,
                sources=live.template.sources,
            )
        )
    )
    try:
        report = await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
    crash_point("machines.stored")
    return report


def figures(taken: Taken, report: WriteReport, durable_s: float) -> Mapping[str, Any]:
    """Return what a snapshot cost, as the row keeps it: seconds, bytes, pages."""
    return {
        "standstill_s": taken.capture.standstill_s,
        "freezer_s": taken.freezer_s,
        "durable_s": durable_s,
        "new_bytes": report.new_bytes,
        "pages_captured": {"memory": taken.capture.memory.count, "disk0": taken.capture.disk.count},
        "pages_new": report.pages_new,
        "pages_shared": dict(report.pages_shared),
        "forkable": taken.forkable,
        "timings_s": {**taken.timings_s, **{f"store.{k}": v for k, v in report.timings_s.items()}},
    }


def snapshot_meta(taken: Taken, **fields: Any) -> SnapshotMeta:
    """Return the manifest's metadata for a capture."""
    return SnapshotMeta(fingerprint=fingerprint_json(taken.capture.fingerprint), forkable=taken.forkable, **fields)
