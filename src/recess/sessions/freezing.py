"""Putting a session away: snapshot, check-and-set, evict. The three steps in the one order that is safe.

    snapshot   the machine stands still and stays paused; the snapshot carries the position its own entry will have
    freeze     one transaction of the log: {nothing in the inbox after what was seen?} entry, state, snapshot, lease released
    evict      the VM goes and the memory is given back

A crash before `freeze` leaves the older snapshot valid: the new one is garbage with a position that no row names, and
the retention takes it. A crash after it leaves a paused VM beside a frozen session: the next server ends it, or unpauses
it if a message came first; either way its memory equals the log. A message between snapshot and freeze makes `freeze`
return False: the machine is unpaused, goes on, and the snapshot is discarded at once. The desk's lock is held
throughout, so no entry of ours can slip in between.
"""

from __future__ import annotations

import contextlib
from typing import Any

from recess.contextlog.contract import ContextLog, Draft
from recess.crashpoints import crash_point
from recess.errors import RecessError
from recess.machines.service import Machines, SnapshotRow
from recess.sessions.desk import Desk


def snapshot_draft(
    row: SnapshotRow, position: int, why: str, job: str, at: str, code_version: str, *, away: bool = False
) -> Draft:
    """Return the machine.snapshot entry; `job` and `code_version` tell a fork or a rewind which process it will find, and
    `at` what that process was doing (see `AgentSide.at`); `away`: the machine is put away with it."""
    figures = {k: v for k, v in row.figures.items() if isinstance(v, int | float | str)}
    body: dict[str, Any] = {
        "snapshot": row.id, "position": position, "why": why, "figures": figures, "machine": row.machine, "job": job,
        "at": at, "code_version": code_version, "away": away,
    }  # fmt: skip
    return Draft("machine.snapshot", body)


async def freeze(
    log: ContextLog, machines: Machines, desk: Desk, machine_id: str, *, job: str, at: str, why: str, paused: bool,
    idle_s: float = 0.0,
) -> bool:  # fmt: skip
    """Freeze; True: done, the lease is released and the VM is paused (then `evict`). False: a message came, the machine
    runs on. Raises Fenced, OutOfSpace, Unavailable ...; then the machine runs on and the older snapshot is valid."""
    async with desk.lock:
        crash_point("session.before_freeze")
        row = await log.get(desk.session)
        if await log.inbox_after(desk.session, desk.inbox.seen):
            if paused:
                await machines.unpause(machine_id)
            return False
        position = row.head + 1
        taken: SnapshotRow | None = None
        try:
            taken = await machines.snapshot(
                machine_id, why=why, log_position=position, epoch=desk.epoch, resume=False, idle_s=idle_s
            )  # fmt: skip
            crash_point("session.after_snapshot")
            drafts = [snapshot_draft(taken, position, why, job, at, desk.code_version, away=True)]
            frozen = await log.freeze(
                desk.session, desk.epoch, consumed=desk.inbox.seen, snapshot=taken.id, position=position, drafts=drafts
            )
        except RecessError:
            with contextlib.suppress(RecessError):
                await machines.unpause(machine_id)
                if taken is not None:
                    await machines.discard_snapshot(machine_id, taken.id)
            raise
        if not frozen:
            await machines.unpause(machine_id)
            await machines.discard_snapshot(machine_id, taken.id)  # no entry and no row will ever name it
            return False
        crash_point("session.after_freeze")
        desk.frozen(drafts[0], position)
        return True


async def snapshot_running(
    log: ContextLog, machines: Machines, desk: Desk, machine_id: str, *, job: str, at: str, why: str
) -> SnapshotRow:
    """Snapshot a session that goes on, and record it in the log and in the session's row. Returns the snapshot, whose
    log position is that of its own entry: everything before it is in the machine's memory or behind its link."""
    async with desk.lock:
        row = await log.get(desk.session)
        position = row.head + 1
        taken = await machines.snapshot(machine_id, why=why, log_position=position, epoch=desk.epoch, resume=True)
        crash_point("session.after_live_snapshot")
        (landed,) = await desk.append_locked([snapshot_draft(taken, position, why, job, at, desk.code_version)])
        # A message may have taken the predicted position; the memory knows nothing after `position - 1` either way.
        await log.update(desk.session, desk.epoch, snapshot=taken.id, snapshot_position=landed)
        return taken
