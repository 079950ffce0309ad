"""Bringing a session's machine back, by the ladder, and saying so in the log: the rung, why, and what was lost.

Order, and what a crash at each place means: the machine first (a second server finds its id in the row, or makes
another and the reaper ends the first), then the settle pass (keys depend on the log alone: a repeat writes nothing),
then `machine.restore`, then the row says whose the machine is, and only then is an agent let in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from recess.contextlog.branch import on_branch
from recess.contextlog.contract import ContextLog, Draft, Entry, SessionRow
from recess.sessions.agent_job import LABEL, end_job
from recess.sessions.decisions import Rung, keeps_agent, plan_wake
from recess.sessions.machine_hand import Reached

if TYPE_CHECKING:
    from recess.sessions.supervisor import Supervisor

OLDER_SNAPSHOTS = 2
SCAN = 2000
SCAN_AT_WAKE = 256


@dataclass(frozen=True)
class Stored:
    """A snapshot as the log records it."""

    snapshot: str
    position: int
    job: str
    at: str = "next"  # what the process `job` was doing (AgentSide.at)


@dataclass(frozen=True)
class Woken:
    """How the machine came back. `position` is the snapshot's (the head for a machine that never went away)."""

    rung: int
    why: str
    stale: bool
    agent_kept: bool
    seconds: float
    snapshot: str
    position: int
    bytes_read: int = 0
    power_cut: bool = False


async def stored_snapshots(
    log: ContextLog, row: SessionRow, *, to: int | None = None, scan: int = SCAN
) -> list[Stored]:
    """Return the snapshots this branch's log names, newest first, looking back at most `scan` entries."""
    head = row.head if to is None else min(to, row.head)
    entries: list[Entry] = []
    if head > 0:
        entries = on_branch(await log.read(row.id, after=max(0, head - scan), to=head, limit=scan))
    found = [stored_of(e) for e in reversed(entries) if e.kind == "machine.snapshot"]
    own = Stored(row.snapshot, row.snapshot_position, str(row.meta.get("job", "")))
    if row.snapshot and row.snapshot_position <= head and all(one.snapshot != row.snapshot for one in found):
        found.append(own)
    return sorted(found, key=lambda one: -one.position)


def stored_of(entry: Entry) -> Stored:
    """Return what a machine.snapshot entry records."""
    body = entry.body
    return Stored(
        str(body.get("snapshot", "")),
        int(body.get("position", 0)),
        str(body.get("job", "")),
        str(body.get("at", "next")),
    )


async def wake(sup: Supervisor) -> Woken:
    """Get the machine and an honest log. Raises RecessError when no rung holds now."""
    row, desk, deps = sup.held_row, sup.held_desk, sup.deps
    machine = await sup.hand.look()
    known = await stored_snapshots(deps.log, row, scan=SCAN_AT_WAKE)
    plan = plan_wake(
        state=row.state,
        machine_state=machine.state if machine else "",
        machine_snapshot=machine.snapshot if machine else "",
        machine_epoch=int(row.meta.get("machine_epoch", 0)),
        epoch_before=row.epoch,
        snapshot=row.snapshot,
        older_snapshots=[one.snapshot for one in known if one.position <= row.snapshot_position][: OLDER_SNAPSHOTS + 1],
    )
    plan = replace(plan, why=sup.hand.damage or plan.why)
    reached = await sup.hand.climb(plan, sup.config.machine_spec(sup.session), sup.held_lease, row.epoch)
    in_place = reached.rung in (Rung.REATTACH, Rung.UNPAUSE)
    # One that ran on is known as ours at once. One that was brought back is so only when the log says what that has cost: a
    # crash before takes it for older than the log, ends it and brings it back once more. Else the loss would never be told.
    known_as_ours = {"machine_epoch": desk.epoch}
    await sup.save_meta(machine=sup.hand.machine_id, failure="", **(known_as_ours if in_place else {}))
    woken, job_id = await _judge(sup, reached, known)
    if not woken.agent_kept:
        await _end_agents(sup, reached.rung)
    # A kept process goes on with the open turn if it has it: it never went away, or it was put away resting in it.
    goes_on = woken.agent_kept and (in_place or desk.facts.started <= woken.position)
    if desk.facts.open and not desk.facts.cut and not goes_on:
        detail = "the machine runs on, the agent process was gone" if in_place else "the machine was gone"
        await desk.settle(cause="crash", detail=detail, machine_lives=in_place, machine_position=woken.position)
    await desk.append([restore_draft(woken, desk.facts.last_work, (await deps.log.get(sup.session)).head)])
    await sup.save_meta(**known_as_ours)
    await sup.set_state("wake")
    if woken.agent_kept:
        if row.parent and not row.meta.get("machine"):
            sup.agent.untold.append(("fork", {"parent": row.parent, "session": row.id, "at": row.fork_position}))
        sup.agent.untold.append(("resume", {"rung": woken.rung, "why": woken.why, "stale": woken.stale}))
        sup.agent.expect(job_id)
    return woken


async def _judge(sup: Supervisor, reached: Reached, known: Sequence[Stored]) -> tuple[Woken, str]:
    """Decide whether the agent process in this machine may go on, and find it."""
    row, desk, report, rung = sup.held_row, sup.held_desk, reached.report, reached.rung
    job_id, position, at = str(row.meta.get("job", "")), row.head, "next"
    if rung in (Rung.RESUME, Rung.RESTORE):
        stored = next((one for one in known if one.snapshot == report.snapshot), None)
        position = stored.position if stored else report.log_position
        job_id, at = (stored.job, stored.at) if stored else (job_id, at)
    elif rung is Rung.DISK:
        # Its own disk is what the last VM left: no file is older than the log. A snapshot's is of its position.
        position = report.log_position if report.snapshot else row.head
    elif rung is Rung.CREATE:
        position = 0
    facts = desk.facts
    keep = keeps_agent(
        rung, snapshot_position=position, last_work=facts.last_work, turn_open=facts.open,
        turn_started=facts.started, at=at,
    )  # fmt: skip
    keep = keep and job_id.startswith(f"agent-{desk.code_version}-")
    kept = keep and await sup.job.reattach(sup.hand.machine_id, job_id)
    stale = rung not in (Rung.REATTACH, Rung.UNPAUSE) and facts.last_work > position
    woken = Woken(report.rung, report.why, stale, kept, report.seconds, report.snapshot, position,
                  report.bytes_read, report.power_cut)  # fmt: skip
    return woken, job_id


async def _end_agents(sup: Supervisor, rung: Rung) -> None:
    """End every agent process whose memory is not the log's: it must not run beside the one that will be started."""
    if rung in (Rung.DISK, Rung.CREATE):
        return  # none came with it
    link = await sup.deps.machines.link(sup.hand.machine_id)
    for job in await link.jobs():
        if job.label == LABEL and job.exit_code is None:
            await end_job(link, job.job_id, 0.0)


def restore_draft(woken: Woken, last_work: int, head: int) -> Draft:
    """Return the entry that says how a machine came back and what that has cost."""
    body: dict[str, Any] = {
        "rung": woken.rung, "why": woken.why, "snapshot": woken.snapshot, "position": woken.position, "head": head,
        "stale": woken.stale, "seconds": round(woken.seconds, 6), "agent_kept": woken.agent_kept,
        "bytes_read": woken.bytes_read,
    }  # fmt: skip
    lost = _lost(woken, last_work)
    if lost:
        body["lost"] = lost
    return Draft("machine.restore", body)


def _lost(woken: Woken, last_work: int) -> str:
    """Return what is gone, in one line for the model; "" if nothing is."""
    if woken.rung == 5:
        return "all files, processes and memory of before" if woken.stale else ""
    since = f"changed after entry {woken.position}, up to entry {last_work}"
    if woken.rung == 4:
        # A plain process's folder, and a disk that was settled, are whole; a VM that was killed lost its power.
        kept = "; files that nobody had synced, as by a power failure" if woken.power_cut else "; no file"
        return "processes and memory of before" + (f"; files {since}" if woken.stale else kept)
    return f"files, processes and memory {since}" if woken.stale else ""
