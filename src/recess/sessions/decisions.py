"""Every decision about a session as a pure function over frozen data. No clock, no log, no machine in here.

The supervisor looks (`View`), asks `decide`, and carries out the one `Move` it gets. So the whole behaviour can be
read, and searched by property tests, without a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

ATTEMPTS_MAX = 3
POLICIES = ("pin", "turn", "now", "contract")
_AT_TURN = ("turn", "contract")  # the policies under which newer code waits for a turn's boundary


class Act(StrEnum):
    """What the supervisor does next."""

    WAIT = "wait"  # for a signal, at most Move.seconds
    END_TURN = "end_turn"  # the agent came back for more: its turn is done
    REDELIVER = "redeliver"  # the open turn, to an agent that does not have it
    START_TURN = "start_turn"  # the next message of the inbox
    UPGRADE = "upgrade"  # swap the agent process
    CUT_FOR_UPGRADE = "cut_for_upgrade"  # policy "now": not even the turn's end is awaited
    PARK = "park"
    FREEZE = "freeze"
    UNPARK = "unpark"
    RESTART_AGENT = "restart_agent"
    FAIL_TURN = "fail_turn"
    RECOVER = "recover"  # the machine is gone
    TELL_CANCEL = "tell_cancel"  # ask the agent to stop its turn
    CANCEL_TURN = "cancel_turn"  # end the open turn without waiting for the agent any longer
    SNAPSHOT = "snapshot"  # by the agent's policy; the machine goes on
    ANSWER = "answer"  # what the resting agent waits for is there
    GROW = "grow"  # the turn was cut for want of memory: the machine gets more, once


@dataclass(frozen=True)
class View:
    """All that `decide` may know. Times in seconds."""

    state: str  # running | parked
    machine_alive: bool
    agent_alive: bool  # its process; False: it has ended or was never started
    agent_failed: bool  # its last process ended by itself, not with code 0, and no turn was failed for it yet
    agent_ended: bool  # a process was started since the machine came up, and has ended by itself
    waiting: bool  # it asked for the next turn
    done: int  # the turn it says it has finished (0: none)
    turn: int
    turn_open: bool
    turn_cut: bool
    cuts: int  # how often the open turn was cut by a crash
    calls_open: int
    inbox: bool
    holds: int
    idle_s: float  # since the last activity
    idle_timeout_s: float
    park_s: float  # between parked and frozen
    suspend_wanted: bool
    freeze_blocked_s: float  # the last freeze failed: not again before this
    upgrade_to: str  # a deployed version that is not ours, or ""
    policy: str
    cancel: bool = False  # the open turn (or, if none is, the next) is to be stopped
    by_hand: bool = False  # a human works in the machine: no turn is begun, no process started
    oom: bool = False  # the open turn's newest attempt was cut because this very machine ran out of memory
    may_grow: bool = False  # and it may be made larger
    limit_in_s: float | None = None  # when the open turn will have been at work for too long
    cancel_told: bool = False  # the agent knows
    cancel_s: float = 0.0  # how long it may take yet to stop by itself
    resting: bool = False  # the agent waits in its turn for what the host will tell it
    ready: bool = False  # and that is there now
    due_s: float | None = None  # or will be, by its clock, in this time
    rest_s: float = 0.0  # how long a resting agent's machine stays up
    due_near_s: float = 0.0  # a time nearer than this is waited for with the machine up
    snapshot_in_s: float | None = None  # when the agent's policy wants a snapshot (see `snapshot_in`)


@dataclass(frozen=True)
class Move:
    """One decision and why; `seconds` bounds a WAIT (None: until a signal)."""

    act: Act
    why: str
    seconds: float | None = None


def decide(view: View) -> Move:
    """Return the next move."""
    if not view.machine_alive:
        return Move(Act.RECOVER, "the machine is gone")
    if view.state == "parked":
        return _parked(view)
    if view.cancel:
        return _cancel(view)
    if view.by_hand and not view.turn_open:
        return _idle(view)
    if view.upgrade_to and view.policy == "now" and view.turn_open and not view.turn_cut:
        return Move(Act.CUT_FOR_UPGRADE, "policy now")
    if view.upgrade_to and view.policy == "now" and not view.turn_open:
        return Move(Act.UPGRADE, "policy now")
    if not view.agent_alive:
        return _without_agent(view)
    if not view.waiting:
        return _resting(view) if view.turn_open and view.resting else _at_work(view)
    if view.turn_open:
        if view.done >= view.turn:
            return Move(Act.END_TURN, "the agent asks for the next turn")
        if view.cuts >= ATTEMPTS_MAX:
            return Move(Act.FAIL_TURN, f"cut {view.cuts} times")
        return Move(Act.REDELIVER, "the agent does not have the open turn")
    if _snapshot_due(view) and not view.suspend_wanted:
        return Move(Act.SNAPSHOT, "a turn's boundary")
    if view.inbox:
        if view.upgrade_to and view.policy in _AT_TURN:
            return Move(Act.UPGRADE, "a turn's boundary")
        return Move(Act.START_TURN, "a message waits")
    return _idle(view)


def _snapshot_due(view: View) -> bool:
    return view.snapshot_in_s is not None and view.snapshot_in_s <= 0 and view.freeze_blocked_s <= 0


def _at_work(view: View) -> Move:
    if _snapshot_due(view):
        return Move(Act.SNAPSHOT, "by the agent's policy")
    left = None if view.snapshot_in_s is None else max(view.snapshot_in_s, view.freeze_blocked_s)
    if view.limit_in_s is not None:
        left = view.limit_in_s if left is None else min(left, view.limit_in_s)
    return Move(Act.WAIT, "the agent is at work", left)


def _cancel(view: View) -> Move:
    """A stop comes before everything but a dead machine."""
    if not view.turn_open:
        return Move(Act.START_TURN, "it is begun to be cancelled")
    if not view.agent_alive or view.turn_cut:
        return Move(Act.CANCEL_TURN, "no process is at it")
    if view.waiting and view.done >= view.turn:
        return Move(Act.END_TURN, "the agent has stopped")
    if view.waiting:
        return Move(Act.CANCEL_TURN, "the agent does not have the turn")
    if view.cancel_s <= 0:
        return Move(Act.CANCEL_TURN, "the agent did not stop by itself")
    if not view.cancel_told:
        return Move(Act.TELL_CANCEL, "a stop was asked for")
    return Move(Act.WAIT, "the agent is stopping", view.cancel_s)


def _resting(view: View) -> Move:
    """The agent waits in the middle of its turn: its machine need not be up."""
    if view.ready:
        return Move(Act.ANSWER, "what the agent waits for is there")
    if view.calls_open or (view.holds and not view.suspend_wanted):
        return Move(Act.WAIT, "a tool is at work" if view.calls_open else "held", view.due_s)
    if view.due_s is not None and view.due_s <= view.due_near_s and not view.suspend_wanted:
        return Move(Act.WAIT, "its time is near", view.due_s)
    quiet = max(view.rest_s - view.idle_s, 0.0)
    left = view.freeze_blocked_s if view.suspend_wanted else max(quiet, view.freeze_blocked_s)
    if left > 0:
        return Move(Act.WAIT, "resting", left if view.due_s is None else min(left, view.due_s))
    return Move(Act.FREEZE, "the agent waits for an answer or a time")


def _without_agent(view: View) -> Move:
    if view.turn_open and view.turn_cut and view.oom:
        # The same again in the same machine would end the same: a larger one, or a human.
        return Move(Act.GROW, "out of memory") if view.may_grow else Move(Act.FAIL_TURN, "out of memory")
    if view.turn_open and view.cuts >= ATTEMPTS_MAX:
        return Move(Act.FAIL_TURN, f"cut {view.cuts} times")
    if view.inbox and not view.turn_open and view.upgrade_to and view.policy in _AT_TURN:
        return Move(Act.UPGRADE, "a turn's boundary")
    if view.inbox and not view.turn_open and view.agent_failed:
        # Code that ends before it asks for its turn: begin the turn without it, so that its attempts are counted.
        return Move(Act.START_TURN, "a message waits and the agent ended before it asked for it")
    if view.turn_open or view.inbox:
        return Move(Act.RESTART_AGENT, "there is work and no agent process")
    if not view.agent_ended and not view.suspend_wanted and not view.upgrade_to:
        return Move(Act.RESTART_AGENT, "to be ready before the first message")
    return _idle(view)


def _parked(view: View) -> Move:
    if (view.inbox and not view.by_hand) or view.turn_open or view.holds or view.cancel:
        return Move(Act.UNPARK, "there is work")
    left = max(view.idle_timeout_s + view.park_s - view.idle_s, view.freeze_blocked_s)
    if view.suspend_wanted or left <= 0:
        return Move(Act.FREEZE, "suspend was asked for" if view.suspend_wanted else "idle")
    return Move(Act.WAIT, "parked", left)


def _idle(view: View) -> Move:
    if view.suspend_wanted and not view.calls_open:
        return Move(Act.FREEZE, "suspend was asked for")
    if view.holds:
        return Move(Act.WAIT, "held")
    if view.calls_open:
        return Move(Act.WAIT, "a tool is open")
    if view.freeze_blocked_s > 0:
        return Move(Act.WAIT, "the last freeze failed", view.freeze_blocked_s)
    left = view.idle_timeout_s - view.idle_s
    if left > 0:
        return Move(Act.WAIT, "idle", left)
    if view.park_s > 0:
        return Move(Act.PARK, "idle")
    return Move(Act.FREEZE, "idle")


class Rung(StrEnum):
    """How a machine is brought back, warmest first."""

    REATTACH = "reattach"  # it runs already: a restarted server takes it over (rung 1)
    UNPAUSE = "unpause"  # rung 1
    RESUME = "resume"  # from its own newest snapshot (rung 2, or 3 from a remote store)
    RESTORE = "restore"  # from a snapshot that is not the machine's newest state (rung 2 or 3)
    DISK = "disk"  # its disk boots cold: files are kept, memory is gone (rung 4)
    CREATE = "create"  # a fresh machine; the log is what is left (rung 5)


@dataclass(frozen=True)
class WakePlan:
    """The steps of the ladder to try, in this order, and whether to end the old VM first. `own_disk`: the disk that the
    machine's last VM left may be booted; `disks`: the snapshots whose disks may be, newest first."""

    steps: tuple[tuple[Rung, str], ...]  # (rung, snapshot id or "")
    kill_first: bool
    why: str
    own_disk: bool = False
    disks: tuple[str, ...] = ()


def plan_wake(
    *,
    state: str,
    machine_state: str,
    machine_snapshot: str,
    machine_epoch: int,
    epoch_before: int,
    snapshot: str,
    older_snapshots: Sequence[str] = (),
) -> WakePlan:
    """Choose the rungs. `machine_state` is "" when there is no such machine; `epoch_before` is the log's epoch before
    this claim, `machine_epoch` the one under which this node last drove the machine: when they differ, somebody else
    owned the session in between and the machine's memory is older than the log."""
    stored = tuple(one for one in dict.fromkeys([snapshot, *older_snapshots]) if one)
    # A machine that is there boots its own disk or a snapshot's; a fork that never had one, or whose machine nobody can
    # find any more, boots a snapshot's disk as a machine of its own.
    disk = ((Rung.DISK, ""),) if machine_state else tuple((Rung.DISK, one) for one in stored)
    ladder = (*((Rung.RESTORE, one) for one in stored), *disk, (Rung.CREATE, ""))
    current = machine_epoch == epoch_before
    first, kill, why = _first_step(state, machine_state, machine_snapshot, snapshot, current=current)
    if not machine_state and not stored:
        why = "first start"
    return WakePlan((*first, *ladder), kill, why, own_disk=bool(machine_state) and current, disks=stored)


def _first_step(
    state: str, machine_state: str, machine_snapshot: str, snapshot: str, *, current: bool
) -> tuple[tuple[tuple[Rung, str], ...], bool, str]:
    """Return the step that only this machine as it is now can take, whether to end it first, and why."""
    if machine_state in ("running", "stalled"):  # stalled: it waits for room on the host's disk, and lacks nothing
        if current and state in ("running", "parked"):
            return ((Rung.REATTACH, ""),), False, "the machine runs on"
        return (), True, "the running machine is older than the log"
    if machine_state == "paused":
        if current:
            return ((Rung.UNPAUSE, ""),), False, "parked in memory"
        return (), True, "the paused machine is older than the log"
    if machine_state == "suspended" and snapshot and machine_snapshot == snapshot:
        return ((Rung.RESUME, snapshot),), False, "frozen"
    return (), False, "frozen" if state == "frozen" else f"its machine is {machine_state or 'gone'}"


def keeps_agent(
    rung: Rung, *, snapshot_position: int, last_work: int, turn_open: bool, turn_started: int, at: str = "next"
) -> bool:
    """Tell whether the agent process in this machine's memory may go on: its memory equals the log.

    A re-attached or unpaused machine has missed nothing. A snapshot is as good when no work came after it and the process
    was at rest (`at`): waiting for its next turn, or, in the turn that is open now, for an answer or a time. One that was
    caught at work has connections that are gone.
    """
    if rung in (Rung.REATTACH, Rung.UNPAUSE):
        return True
    if rung in (Rung.DISK, Rung.CREATE) or last_work > snapshot_position:
        return False
    return at == ("wait" if turn_open and turn_started <= snapshot_position else "next")


def snapshot_in(
    policy: str,
    every_s: float,
    *,
    last_snapshot: int,
    last_work: int,
    last_outcome: int,
    turn_open: bool,
    since_s: float,
) -> float | None:
    """Return in how many seconds an agent that is not put away wants a snapshot (0: now), None if nothing calls for one.
    `policy`: off | turn (at each turn's end) | tool (also after each tool call) | seconds (every `every_s`, the last one
    `since_s` ago). Nothing that a snapshot would keep has happened unless work came after `last_snapshot`."""
    if last_work <= last_snapshot:
        return None
    match policy:
        case "seconds":
            return max(0.0, every_s - since_s)
        case "turn" | "tool" if not turn_open:
            return 0.0
        case "tool" if last_outcome > last_snapshot:
            return 0.0
    return None


@dataclass(frozen=True)
class Contracts:
    """Numbers by which code says what its clients may expect of it: what the message at hand `wants`, what the session's code `has`,
    what the deployed one `offers`."""

    wants: int = 0
    has: int = 0
    offers: int = 0

    @property
    def move(self) -> bool:
        """Tell whether the message needs the deployed code."""
        return self.has < self.wants <= self.offers


def upgrade_target(current: str, deployed: str, policy: str, contracts: Contracts) -> str:
    """Return the version to move to, or "" to stay."""
    if not deployed or deployed == current or policy == "pin":
        return ""
    return deployed if policy != "contract" or contracts.move else ""


def speaks(policy: str, contracts: Contracts) -> bool:
    """Tell whether a message will meet code of the contract it wants: the session's, or, unless that is pinned, the deployed."""
    return contracts.wants <= contracts.has or (policy != "pin" and contracts.wants <= contracts.offers)


def snapshot_for(position: int, snapshots: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """Return the newest (id, position) that is not newer than `position`, or ("", 0)."""
    fitting = [one for one in snapshots if one[1] <= position]
    return max(fitting, key=lambda one: one[1], default=("", 0))


def keeper_deadline_s(lease_left_s: float, *, margin_s: float, embedded: bool, orphan_s: float) -> float:
    """Return how long the keeper lets the machine live without news from us.

    In a cluster: until shortly before the lease ends, so that a fenced copy is dead before another node may start one.
    Embedded: the lock on the home is what proves an owner dead, nobody else can take the session, and a restarted
    server wants to find its machines alive; so an orphan gets `orphan_s`, and only the broker is cut at the lease's end.
    """
    until_lease = max(0.0, lease_left_s - margin_s)
    return max(until_lease, orphan_s) if embedded else until_lease
