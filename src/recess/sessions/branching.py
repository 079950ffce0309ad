"""Forks and rewinds: log and machine together. Also what is done to sessions that are not live.

A fork copies no bytes: the child's log shares the parent's entries, its machine starts from a snapshot that several
children may share, and both are materialised at its first message. The child, its snapshot and its own first entry are one
transaction: a crash leaves a whole child or none.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from recess.contextlog.contract import Born, Draft, SessionRow
from recess.crashpoints import crash_point
from recess.errors import BadInput, IllegalState, NotFound, RecessError
from recess.sessions.decisions import snapshot_for
from recess.sessions.deps import Deps
from recess.sessions.freezing import snapshot_running
from recess.sessions.keys import child_id
from recess.sessions.protocol import Request
from recess.sessions.states import next_state
from recess.sessions.waking import Stored, stored_snapshots

if TYPE_CHECKING:
    from recess.sessions.supervisor import Supervisor

FORKS_MAX = 64  # of one turn, by its agent

# What a row's meta says of its machine and of what waits for it; a fork and a rewound session begin without.
MACHINE_META = ("machine", "job", "failure", "machine_epoch", "queued", "due", "worked", "by_hand")


async def fork_live(sup: Supervisor, name: str) -> SessionRow:
    """Fork a live session at its head (runs inside its actor): snapshot the running machine, then fork the log at the
    snapshot's own entry, so that the child's memory equals its log."""
    child = await _split(sup, name)
    await sup.held_desk.append([Draft("fork", {"child": child.id, "at": child.fork_position})])
    return child


async def fork_turn(sup: Supervisor, request: Request) -> str:
    """Fork a session because its agent asks for it, in the middle of its turn (runs inside its actor); returns the child's id.
    The child has the machine as it is now and the log up to here; it waits for a message of its own, or gets `text`.

    Crash safety: the child's id comes from (session, turn, ref). Its parent's log names it last: until then a request that is
    sent again finds the child and does what is not done yet. Raises BadInput over the cap.
    """
    desk, deps = sup.held_desk, sup.deps
    desk.check_turn(request.turn)
    ident, key = child_id(sup.session, request.turn, f"fork/{request.ref}"), f"t{request.turn}/fork/{request.ref}"
    if key in desk.facts.keys:
        return ident
    if sum("/fork/" in one for one in desk.facts.keys) >= FORKS_MAX:
        raise BadInput(f"a turn forks at most {FORKS_MAX} times")
    try:
        child = await deps.log.get(ident)
    except NotFound:
        child = await _split(sup, str(request.body["name"]), ident)
    text = str(request.body["text"])
    if text:
        await deps.log.append_inbox(ident, Draft("user", {"text": text, "from": sup.session}, key="fork"))
    body = {"child": ident, "at": child.fork_position}
    await desk.append([Draft("fork", body, turn=request.turn, ref=request.ref, key=key)])
    return ident


async def _split(sup: Supervisor, name: str, ident: str = "") -> SessionRow:
    """Snapshot the running machine and fork the log there."""
    desk, deps = sup.held_desk, sup.deps
    if sup.state == "parked":
        await deps.machines.unpause(sup.hand.machine_id)
        await sup.set_state("unpark")
    stored_at = sup.agent.at
    taken = await snapshot_running(
        deps.log, deps.machines, desk, sup.hand.machine_id, job=sup.job.job_id, at=stored_at, why="fork"
    )
    row = await deps.log.get(sup.session)
    stored = Stored(taken.id, taken.log_position, sup.job.job_id, stored_at)
    return await _branch(deps, row, row.snapshot_position, stored, desk.code_version, name, ident)


async def fork_stored(deps: Deps, session: str, at: int | None, name: str) -> SessionRow:
    """Fork a session from what is stored: at its head, or at `at` with the newest snapshot that is not newer."""
    row = await deps.log.get(session)
    position = row.head if at is None else at
    if not 0 <= position <= row.head:
        raise BadInput(f"session {row.id} has positions 1 to {row.head}, not {position}")
    stored = await _newest(deps, row, position)
    return await _branch(deps, row, position, stored, row.code_version, name)


async def _newest(deps: Deps, row: SessionRow, position: int) -> Stored | None:
    # A row names the newest on its branch, that of a fork or of a rewound session too.
    if not row.snapshot:
        return None
    known = await stored_snapshots(deps.log, row, to=position)
    there = await deps.machines.stored_snapshots({one.snapshot for one in known})  # the retention may have taken some
    known = [one for one in known if one.snapshot in there]
    chosen, _position = snapshot_for(position, [(one.snapshot, one.position) for one in known])
    return next((one for one in known if one.snapshot == chosen), None) if chosen else None


async def _branch(
    deps: Deps, parent: SessionRow, at: int, stored: Stored | None, code_version: str, name: str, ident: str = ""
) -> SessionRow:
    """Make the child: messages it inherits are its parent's, not its own work."""
    born = Born(
        Draft("fork", {"parent": parent.id, "at": at}, key="born"),
        next_state("cold", "seed") if stored else "cold",
        code_version,
        stored.snapshot if stored else "",
        stored.position if stored else 0,
        {"job": stored.job} if stored else {},
    )
    child = await deps.log.fork(parent.id, at=at, name=name, session_id=ident, born=born)
    crash_point("session.after_fork")
    return child


async def rewind(deps: Deps, session: str, to: int) -> SessionRow:
    """Rewind a session that is not live: its machine is ended, the branch cut, the newest fitting snapshot chosen. The
    agent's process is started anew at the next message, since its memory may be newer than the branch."""
    row = await deps.log.get(session)
    if not 0 <= to < row.head:
        raise BadInput(f"session {row.id} can be rewound to 0 to {row.head - 1}, not {to}")
    stored = await _newest(deps, row, to)
    settings = deps.settings
    claimed = await deps.log.claim(
        row.id, settings.owner, settings.lease_s, now=deps.clock.wall_s(), force=settings.embedded
    )
    await drop_machine(deps, row)
    await deps.log.append(row.id, claimed.epoch, [Draft("rewind", {"to": to})])
    crash_point("session.after_rewind")
    meta = {key: value for key, value in claimed.meta.items() if key not in MACHINE_META}
    consumed = max((e.position for e in await deps.log.inbox_after(row.id, 0)), default=0)
    await deps.log.update(
        row.id, claimed.epoch, meta=meta, consumed=consumed,
        snapshot=stored.snapshot if stored else "", snapshot_position=stored.position if stored else 0,
    )  # fmt: skip
    await deps.log.release(row.id, claimed.epoch, state="frozen" if stored else "cold")
    return await deps.log.get(row.id)


async def drop_machine(deps: Deps, row: SessionRow) -> None:
    """End and forget a session's machine; snapshots stay. One that is not there is no error."""
    machine = str(row.meta.get("machine", ""))
    if machine:
        with contextlib.suppress(NotFound, IllegalState):
            await deps.machines.remove(machine, force=True)


async def end_leftover(deps: Deps, row: SessionRow) -> None:
    """End the VM of a session that was frozen just before its server died: the snapshot is stored, the memory is owed."""
    machine = str(row.meta.get("machine", ""))
    if not machine or row.state != "frozen":
        return
    with contextlib.suppress(RecessError):
        found = await deps.machines.get(machine)
        if found.state == "paused":
            await deps.machines.evict(machine, snapshot=row.snapshot)
        elif found.state == "running":
            await deps.machines.kill(machine, why="its session is frozen")
