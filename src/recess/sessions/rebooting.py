"""A session's machine that boots again as another one: with more memory because it ran out of it, with the image that newer
code asks for. Its disk stays; memory and processes go, and the log says so.

Crash safety: `Machines.reboot` ends the VM and changes the row in one step, so a server that dies in between finds a machine that
has ended and boots its disk, as the row says by then. Nothing of the turn moves before the machine is back: a turn that was cut for
want of memory names the memory it was cut with, and a machine that has more needs no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recess.contextlog.contract import Draft
from recess.crashpoints import crash_point
from recess.errors import InvalidSpec, NotFound, RecessError, Unsupported
from recess.sessions.facts import TurnFacts
from recess.sessions.waking import Woken, restore_draft
from recess.units import MIB

if TYPE_CHECKING:
    from recess.sessions.supervisor import Supervisor

KILLED = 137  # 128 + SIGKILL
CANNOT = (InvalidSpec, NotFound, Unsupported)  # the machine was not touched


async def oom_kills(sup: Supervisor) -> int:
    """Return how many processes the machine's kernel has ended for want of memory; 0 if it cannot say."""
    try:
        count = (await (await sup.deps.machines.link(sup.hand.machine_id)).stats()).get("oom_kills", 0)
    except RecessError:
        return 0
    return count if isinstance(count, int) else 0


async def ran_out(sup: Supervisor) -> bool:
    """Tell whether the agent's process, which has ended, was ended for want of memory."""
    ended = sup.ended_job
    return ended is not None and ended.exit_code == KILLED and await oom_kills(sup) > sup.oom_kills


def oom_detail(sup: Supervisor) -> str:
    """Return what the log and the model are told of it."""
    larger = sup.config.larger_bytes(sup.memory_bytes)
    size = f"of {sup.memory_bytes // MIB} MiB " if sup.memory_bytes else ""
    what = f"the machine {size}ran out of memory and its kernel ended the agent's process"
    return f"{what}; it gets {larger // MIB} MiB" if larger else what


def out_of_memory(facts: TurnFacts) -> str:
    """Return why a turn ends that would need more memory than there may be."""
    return (
        f"out of memory: {facts.oom_bytes // MIB} MiB are not enough, and the machine may have no more. "
        "Deploy with a larger memory= or memory_most=, then send a message"
    )


async def make_larger(sup: Supervisor) -> str:
    """Give the machine more memory, once; returns why it cannot have more, "" when it has."""
    larger = sup.config.larger_bytes(sup.memory_bytes)
    try:
        await _reboot(sup, f"it ran out of memory and has {larger // MIB} MiB now", memory_bytes=larger)
    except CANNOT as exc:
        return f"out of memory, and the machine cannot have more: {exc.message}"
    return ""


async def fit_image(sup: Supervisor) -> None:
    """Have the machine boot the image that the session's code asks for, if it is another one. Where that cannot be, it stays
    as it is, and the log says why."""
    machine = await sup.deps.machines.get(sup.hand.machine_id)
    before, wanted = machine.spec.image, sup.config.image
    if wanted == before or sup.config.backend != "machine" or sup.image_refused == wanted:
        return
    try:
        await _reboot(sup, f"its image was {before} and is {wanted} now", image=wanted)
    except CANNOT as exc:
        sup.image_refused = wanted
        body = {"image": wanted, "kept": before, "why": exc.message}
        await sup.held_desk.append([Draft("x.image_kept", body)])


async def _reboot(sup: Supervisor, why: str, *, image: str = "", memory_bytes: int = 0) -> None:
    desk = sup.held_desk
    await sup.job.forget()
    await sup.agent.shut()
    report = await sup.hand.reboot(image=image, memory_bytes=memory_bytes)
    crash_point("session.after_reboot")
    head = (await sup.deps.log.get(sup.session)).head
    woken = Woken(report.rung, f"{why}; {report.why}", False, False, report.seconds, "", head)
    await desk.append([restore_draft(woken, desk.facts.last_work, head)])
    await sup.look_at_machine()
