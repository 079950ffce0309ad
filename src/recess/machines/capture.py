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
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recess.clock import Clock
from recess.crashpoints import crash_point
from recess.errors import Corrupt, GuestFailed, NotFound, RecessError, Timeout
from recess.machines.contract import Capture
from recess.machines.live import Live
from recess.machines.mapped import capture_parts
from recess.machines.parts import UNDO
from recess.machines.starting import finish
from recess.machines.templates import fingerprint_json
from recess.snapshots.contract import SnapshotMeta, SnapshotStore, WriteReport

FREEZE_S = 2.0
SYNC_FREEZE_S = 10.0


@dataclass
class Taken:
    """A capture and what it cost the guest. Seconds; `began` (monotonic) is when the workload began to stand still."""

    capture: Capture
    forkable: bool
    began: float
    freezer_s: float  # the workload's standstill as the host saw it, guestd's freezer included
    timings_s: dict[str, float]


async def take(
    live: Live, clock: Clock, *, resume: bool, sync: bool, parent: str = "", disk_too: bool = False
) -> Taken:
    """Freeze, capture and (with `resume`) wake. On an error a machine that ran runs again. `parent`, `disk_too`: see
    `Vm.capture`.

    Raises DriverFailed, OutOfSpace, Unsupported, GuestFailed, Timeout. If `live.workload_frozen` is then set on a
    machine that is not paused, its workload could not be woken: the caller must end it, it is not served half-awake.
    """
    began = clock.monotonic_s()
    pause = _Pause(live, clock, sync)
    parked = live.workload_frozen or live.paused_since != 0.0
    try:
        capture = await live.vm.capture(
            resume=resume,
            before_pause=None if parked else pause.freeze,
            after_resume=None if parked else pause.wake,
            parent=parent,
            disk_too=disk_too,
        )
    except UNDO:
        with contextlib.suppress(GuestFailed, Timeout):
            await pause.wake()
        raise
    if not resume and live.paused_since == 0.0:
        live.paused_since = clock.monotonic_s()
    timings = {f"capture.{k}": v for k, v in capture.timings_s.items()} | pause.timings_s
    return Taken(capture, pause.forkable, pause.still or began, pause.standstill_s(), timings)


class _Pause:
    """The workload's side of one capture: frozen right before the vCPUs stop, woken as soon as they run again."""

    def __init__(self, live: Live, clock: Clock, sync: bool) -> None:
        self._live = live
        self._clock = clock
        self._sync = sync
        self.still = 0.0
        self._woken = 0.0
        self.forkable = True
        self.timings_s: dict[str, float] = {}

    async def freeze(self) -> None:
        """Freeze the workload; a guest that does not answer is captured all the same."""
        began = self._clock.monotonic_s()
        try:
            await self._live.link.freeze(sync=self._sync, timeout_s=SYNC_FREEZE_S if self._sync else FREEZE_S)
            self._live.workload_frozen = True
        except (GuestFailed, Timeout):
            self.forkable = False
        now = self._clock.monotonic_s()
        # With `sync` the call holds a syncfs, during which the workload still runs: the standstill begins after it.
        self.still = now if self._sync else began
        self.timings_s["freeze"] = now - began

    async def wake(self) -> None:
        """Let the workload run again, if it was frozen here."""
        if self.still == 0.0 or not self._live.workload_frozen:
            return
        began = self._clock.monotonic_s()
        await self._live.wake(began - self.still)
        self._woken = self._clock.monotonic_s()
        self.timings_s["wake"] = self._woken - began

    def standstill_s(self) -> float:
        """Return how long the workload stood still; up to now if it was left so."""
        if self.still == 0.0:
            return 0.0
        return (self._woken or self._clock.monotonic_s()) - self.still


async def store_capture(
    store: SnapshotStore, live: Live, taken: Taken, meta: SnapshotMeta, *, parent: str
) -> WriteReport:
    """Write a capture in a thread and return when it is durable. The capture's buffers outlive the thread whatever
    happens to the caller: a cancelled caller still waits for the write to end before the buffers go."""
    use_template = taken.capture.base == "template"
    parts = capture_parts(taken.capture)

    def write(parent_id: str) -> WriteReport:
        return store.write(
            parts,
            taken.capture.vmstate,
            meta,
            template=live.template.pages if use_template else None,
            parent_id=parent_id,
            sources=live.template.sources,
        )

    def write_at_any_rate() -> WriteReport:
        try:
            return write(parent)
        except (Corrupt, NotFound):
            if not parent or any(part.inherits for part in parts):
                raise
            return write("")  # the parent only saves bytes: it may be damaged, or removed since

    work = asyncio.create_task(asyncio.to_thread(write_at_any_rate))
    try:
        report = await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if work.exception() is None:
            await finish(drop_nameless(store, work.result().snapshot_id))
        raise
    crash_point("machines.stored")
    return report


async def drop_nameless(store: SnapshotStore, snapshot_id: str) -> None:
    """Delete a snapshot whose row will never be written: at once, not after the grace period. In doubt the sweep does."""
    with contextlib.suppress(RecessError):
        await asyncio.to_thread(store.discard, snapshot_id)


def figures(taken: Taken, report: WriteReport, durable_s: float) -> Mapping[str, Any]:
    """Return what a snapshot cost, as the row keeps it: seconds, bytes, pages."""
    return {
        "standstill_s": taken.capture.standstill_s,
        "freezer_s": taken.freezer_s,
        "durable_s": durable_s,
        "new_bytes": report.new_bytes,
        "cpu_s": report.cpu_s,
        "counts_from": taken.capture.parent,
        "pages_captured": {"memory": taken.capture.memory.count, "disk0": taken.capture.disk.count},
        "pages_new": report.pages_new,
        "pages_shared": dict(report.pages_shared),
        "forkable": taken.forkable,
        "timings_s": {**taken.timings_s, **{f"store.{k}": v for k, v in report.timings_s.items()}},
    }


def snapshot_meta(taken: Taken, **fields: Any) -> SnapshotMeta:
    """Return the manifest's metadata for a capture."""
    return SnapshotMeta(fingerprint=fingerprint_json(taken.capture.fingerprint), forkable=taken.forkable, **fields)
