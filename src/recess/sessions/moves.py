"""How each move of `decisions.decide` is carried out. Each function is one act of the supervisor's one task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recess.contextlog.contract import Draft
from recess.crashpoints import crash_point
from recess.errors import Fenced, RecessError, Unavailable
from recess.sessions.agent_config import check_config
from recess.sessions.agent_job import Ended
from recess.sessions.children import report
from recess.sessions.decisions import Act
from recess.sessions.facts import OOM
from recess.sessions.freezing import freeze, snapshot_running
from recess.sessions.rebooting import fit_image, make_larger, oom_detail, oom_kills, out_of_memory, ran_out
from recess.sessions.states import next_state
from recess.sessions.waits import next_due, outcome

if TYPE_CHECKING:
    from recess.sessions.supervisor import Supervisor

RECOVERIES_MAX = 3
REFUSED_INSIDE = (
    "no_space",
    "no_program",
    "not_executable",
    "not_found",
)  # guestd's words for what will not pass by itself


async def deliver(sup: Supervisor, act: Act) -> None:
    """Hand the agent its turn: the next message's, or the open one which it does not have."""
    desk = sup.held_desk
    if act is Act.START_TURN:
        await desk.start_turn()
        if not desk.facts.open:
            await report(sup)  # it was cancelled before it began
            return
    elif desk.facts.cut:
        await desk.next_attempt()
    if not sup.agent.waiting:
        return
    facts, sup.recoveries = desk.facts, 0
    found = await sup.deps.log.read(sup.session, after=facts.inbox - 1, to=facts.inbox, limit=1) if facts.inbox else []
    result = {
        "turn": facts.turn, "attempt": facts.attempt, "position": facts.inbox,
        "body": dict(found[0].body) if found else {}, "pending": desk.pending_calls(),
    }  # fmt: skip
    await sup.agent.deliver(result)


async def fail_turn(sup: Supervisor, why: str) -> None:
    """End the open turn as failed, with what the agent said last; the session waits for a human."""
    facts = sup.held_desk.facts
    await sup.held_desk.end_turn("failed", out_of_memory(facts) if facts.oom_bytes else f"{why}: {end_detail(sup)}")
    sup.agent.crash_detail, sup.agent_failed = "", False
    await report(sup)


async def end_turn(sup: Supervisor) -> None:
    """The agent asks for the next turn: this one is done, or was stopped because we asked."""
    status, why = sup.stop
    if status and sup.cancel_told == sup.held_desk.facts.turn:
        await sup.held_desk.end_turn(status, why)
    else:
        await sup.held_desk.end_turn("done")
    await report(sup)


async def tell_cancel(sup: Supervisor) -> None:
    """Ask the agent to stop by itself, which keeps its memory."""
    desk = sup.held_desk
    sup.cancel_told = desk.facts.turn
    await sup.agent.tell_cancel(desk.facts.turn, sup.stop[1])


async def cancel_turn(sup: Supervisor) -> None:
    """End the open turn without the agent. A process that is at it is ended, the machine runs on.

    Crash safety: the cancel is passed in the inbox only by the turn's end, so a crash before it cancels once more; a limit that
    the log counts is found again, and so is a human's wish.
    """
    desk, (status, why) = sup.held_desk, sup.stop
    if sup.job.alive and not sup.agent.waiting:
        await sup.agent.shut("its turn was cancelled")
        await sup.job.stop(term_s=sup.deps.settings.term_s)
        sup.ended_job = None
    crash_point("session.before_cancel")
    if not desk.facts.cut:
        await desk.settle(cause="cancel", detail=why, machine_lives=True)
    await desk.end_turn(status, why)
    await report(sup)


async def answer(sup: Supervisor) -> None:
    """Tell the resting agent what has come."""
    facts, now = sup.held_desk.facts, sup.deps.clock.wall_s()
    for number, request in sup.agent.waits().items():
        found = outcome(facts, request.refs, now)
        if found is not None:
            await sup.agent.end_wait(number, found)


async def grow(sup: Supervisor) -> None:
    """The turn was cut for want of memory: the machine gets more, and the next look begins the turn anew. One that cannot have
    more ends it, and a human decides."""
    refused = await make_larger(sup)
    if refused:
        await sup.held_desk.end_turn("failed", refused)
        await report(sup)


async def restart_agent(sup: Supervisor) -> None:
    """Settle what the dead process left open; if nothing is open (any more), start a process."""
    desk = sup.held_desk
    if not await sup.hand.answers():
        return  # the process ended because the machine did: look again
    if desk.facts.open and not desk.facts.cut:
        await sup.agent.shut()
        if await ran_out(sup):
            await desk.settle(cause=OOM, detail=oom_detail(sup), machine_lives=True, memory_bytes=sup.memory_bytes)
        else:
            await desk.settle(cause="crash", detail=end_detail(sup), machine_lives=True)
        return  # look again: the attempts may be used up
    if desk.facts.open:
        # Counted when its process starts, not when it asks: code that never gets so far uses its attempts up too.
        await desk.next_attempt()
    await start_agent(sup)


def end_detail(sup: Supervisor) -> str:
    """Return one line about why the agent process ended."""
    detail = sup.agent.crash_detail.strip()
    if detail:
        return detail.splitlines()[-1][:500]
    ended = sup.ended_job
    return f"the agent process ended with code {ended.exit_code}" if ended else "the agent process was gone"


async def start_agent(sup: Supervisor) -> None:
    """Start a process of the session's version in the machine; an older one's connection is dropped. The job's id is in
    the row before the process exists, so that whoever comes next knows which process to look for."""
    desk, row = sup.held_desk, sup.held_row
    await fit_image(sup)
    await sup.agent.shut("a newer process takes over")
    sup.agent.untold = [one for one in sup.agent.untold if one[0] == "upgrade"]
    sup.job_count += 1
    sup.ended_job, sup.agent_failed = None, False
    job_id = f"agent-{desk.code_version}-{desk.epoch}-{sup.job_count}"
    await sup.save_meta(job=job_id)
    sup.oom_kills = await oom_kills(sup)
    sup.agent.expect(job_id)
    try:
        await sup.job.start(sup.hand.machine_id, job_id, agent=row.agent, version=desk.code_version, config=sup.config)
    except RecessError as exc:
        if exc.details.get("guest_kind") not in REFUSED_INSIDE:
            raise
        # The machine itself says no (its disk is full, it has no Python): an attempt that failed, like code that dies at once.
        sup.agent.crash_detail = f"the agent cannot be started in its machine: {exc.message}"
        sup.ended_job, sup.agent_failed = Ended(job_id, None, ""), True


async def upgrade(sup: Supervisor, act: Act) -> None:
    """Swap the agent process; the machine and everything else in it runs on. Rollback is the same move.

    Crash safety: the code entry and the row's version come first. A crash after them finds a job id of the older
    version in the row, so the next wake ends that process and starts the new one.
    """
    desk, row = sup.held_desk, sup.held_row
    deployed = await sup.deps.agents.current(row.agent)
    config = check_config(deployed.config)
    await sup.agent.shut("newer code takes over")
    if act is Act.CUT_FOR_UPGRADE:
        await desk.settle(cause="upgrade", detail="newer code takes over", machine_lives=True)
    old = desk.code_version
    key = f"code/{desk.epoch}/{deployed.deployed}"
    await desk.append([Draft("code", {"old": old, "new": deployed.version}, key=key)])
    crash_point("session.before_upgrade")
    await sup.deps.log.update(sup.session, desk.epoch, code_version=deployed.version)
    desk.code_version = deployed.version
    sup.config = config
    await sup.job.stop(term_s=sup.deps.settings.term_s)
    crash_point("session.after_upgrade_stop")
    sup.agent.untold.append(("upgrade", {"old": old, "new": deployed.version}))
    await start_agent(sup)


async def park(sup: Supervisor) -> None:
    """Pause the idle machine in memory."""
    await sup.deps.machines.pause(sup.hand.machine_id)
    await sup.set_state("park")


async def unpark(sup: Supervisor) -> None:
    """Let the paused machine run again."""
    await sup.deps.machines.unpause(sup.hand.machine_id)
    await sup.set_state("unpark")
    sup.touch()


async def put_away(sup: Supervisor) -> None:
    """Freeze. When the store refuses, the machine stays warm, the older snapshot valid, and the next try waits."""
    paused, desk, deps = sup.state == "parked", sup.held_desk, sup.deps
    if not paused:
        await sup.agent.event("suspend", {}, ack_s=deps.settings.hook_s)
        if sup.job.alive and sup.agent.at == "work":
            return  # it has begun something meanwhile: look again
    why = "suspend" if sup.suspend_wanted else "wait" if desk.facts.open else "idle"
    try:
        await desk.keep_waits(
            next_due(desk.facts, [one.refs for one in sup.agent.waits().values()]) if desk.facts.open else None,
            worked=sup.watch.saved() if desk.facts.open else "",
        )
        frozen = await freeze(
            deps.log, deps.machines, desk, sup.hand.machine_id, job=sup.job.job_id, why=why, paused=paused,
            at="next" if paused else sup.agent.at,  # only an agent that waits for its turn is parked
            idle_s=sup.idle_s,
        )  # fmt: skip
    except Fenced:
        raise
    except RecessError as exc:
        sup.no_freeze_before_s = deps.clock.monotonic_s() + deps.settings.freeze_retry_s
        sup.suspend_failed(exc)
        if paused:
            await sup.set_state("unpark")
        await sup.save_meta(failure=exc.message)
        return
    if not frozen:
        if paused:
            await sup.set_state("unpark")
        return
    sup.state = next_state(sup.state, "freeze")
    sup.stopping = True
    await sup.leave()
    await deps.machines.evict(sup.hand.machine_id, snapshot=(await deps.log.get(sup.session)).snapshot)


async def keep_snapshot(sup: Supervisor) -> None:
    """Take a snapshot by the agent's policy; the machine goes on. When the store refuses, the older one is valid, and the
    next try waits as a freeze's does."""
    deps, sup.snapshot_s = sup.deps, sup.deps.clock.monotonic_s()
    try:
        await snapshot_running(
            deps.log, deps.machines, sup.held_desk, sup.hand.machine_id, job=sup.job.job_id, at=sup.agent.at,
            why=f"policy {sup.config.snapshot}",
        )  # fmt: skip
    except Fenced:
        raise
    except RecessError as exc:
        sup.no_freeze_before_s = deps.clock.monotonic_s() + deps.settings.freeze_retry_s
        await sup.save_meta(failure=exc.message)


async def recover(sup: Supervisor) -> None:
    """The machine died under us. With work at hand it is brought back at once, else at the next message."""
    desk, log = sup.held_desk, sup.deps.log
    await sup.job.forget()
    await sup.agent.shut()
    await sup.hand.let_go()
    turn = desk.facts.turn if desk.facts.open else 0
    await desk.append([Draft("machine.lost", {"why": sup.death or "the machine is gone"}, turn=turn)])
    row = await log.get(sup.session)
    sup.state = next_state(sup.state, "fall" if row.snapshot else "drop")
    await desk.look()
    if desk.facts.open or desk.inbox.queue:
        sup.recoveries += 1
        if sup.recoveries > RECOVERIES_MAX:
            raise Unavailable(f"session {sup.session}: its machine died {sup.recoveries} times in a row: {sup.death}")
        sup.row = row
        await sup.wake()
        return
    sup.stopping = True
    await sup.save_meta(due="")
    await log.release(sup.session, desk.epoch, state=sup.state)
