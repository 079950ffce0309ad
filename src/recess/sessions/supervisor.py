"""One live session: an actor that looks, decides and acts, until the session is put away, closed or fenced.

All moves happen in one task, one after the other; the agent's requests, the inbox, timers and deaths only leave notes
and ring the bell. What to do is `decisions.decide`; how to do it is in `moves` and `waking`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from recess.contextlog.contract import SessionRow
from recess.errors import Fenced, IllegalState, RecessError, Timeout, Unavailable
from recess.sessions import byhand, moves
from recess.sessions.agent_config import AgentConfig, check_config
from recess.sessions.agent_job import AgentJob, Ended
from recess.sessions.agent_side import AgentSide
from recess.sessions.branching import fork_turn
from recess.sessions.children import report, spawn
from recess.sessions.decisions import Act, Contracts, View, decide, snapshot_in, upgrade_target
from recess.sessions.deps import Deps
from recess.sessions.desk import Desk
from recess.sessions.facts import TurnFacts
from recess.sessions.inbox import nothing_new
from recess.sessions.lease import Lease, LeaseGate, wait_event
from recess.sessions.limits import Stopwatch, stopwatch_of
from recess.sessions.machine_hand import MachineHand
from recess.sessions.protocol import Request
from recess.sessions.rebooting import oom_kills
from recess.sessions.states import next_state
from recess.sessions.talking import contract_of
from recess.sessions.waits import next_due, outcome
from recess.sessions.waking import Woken, wake

T = TypeVar("T")


class Supervisor:
    """The actor of one session. `run` returns when the session is no longer live; `failure` tells what went wrong."""

    def __init__(self, deps: Deps, gate: LeaseGate, session: str, wake_other: Callable[[str], object]) -> None:
        self.deps = deps
        self.wake_other = wake_other
        self.session = session
        self._bell = asyncio.Event()
        self.hand = MachineHand(deps, gate, session, self._handler, self._machine_died)
        self.job = AgentJob(deps, self._agent_ended)
        self.agent = AgentSide(deps, session, self._bell.set, self._fenced, self._begin)
        self.desk: Desk | None = None
        self.lease: Lease | None = None
        self.row: SessionRow | None = None
        self.config = AgentConfig()
        self.state = "cold"
        self.woken: Woken | None = None
        self.suspend_wanted = False
        self.stopping = False
        self.failure: RecessError | None = None
        self.death = ""
        self.ended_job: Ended | None = None
        self.agent_failed = False  # the last process failed, and no turn was ended for it yet
        self.job_count = 0
        self.no_freeze_before_s = 0.0
        self.snapshot_s = deps.clock.monotonic_s()  # when the last one by the agent's policy was taken
        self.recoveries = 0  # since a turn was last delivered
        self.gone = asyncio.Event()  # set by the service once this one serves no more and its place is free or taken
        self._active_s = deps.clock.monotonic_s()
        self.watch = Stopwatch()  # how long the open turn has been at work
        self.memory_bytes = 0  # of the machine; 0 before there is one
        self.oom_kills = 0  # of the machine's kernel, when the agent's process was started
        self.image_refused = ""  # an image that the machine could not be given
        self.by_hand = ""  # why a human has taken the session over, "" if none has
        self.stop: tuple[str, str] = ("", "")  # how and why the open turn is to be ended: (status, why)
        self.cancel_told = 0  # the turn that the agent was asked to stop
        self._cancel_seen = (0, 0.0)  # what is to stop the turn (a position; below 0: no message), and since when
        self._refused: asyncio.Future[None] | None = None
        self._commands: list[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = []
        self._over = False
        self._renewer: asyncio.Task[None] | None = None

    # -- from outside ----------------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Something in the log changed: look again."""
        self._bell.set()

    def touch(self) -> None:
        """Note activity (exec, a file operation, a terminal, a turn's end): the idle time starts anew."""
        self._active_s = self.deps.clock.monotonic_s()
        self._bell.set()

    @property
    def idle_s(self) -> float:
        """How long ago the last activity was."""
        return self.deps.clock.monotonic_s() - max(self._active_s, self.agent.active_s)

    async def command(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` inside the actor, once the machine is up, between two moves. Raises what it raises, or Timeout if
        the actor ended first (also because the machine did not come up: see `failure`)."""
        if self._over:
            raise self._put_away()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._commands.append((work, future))
        self._bell.set()
        return await future

    # -- the actor -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Claim, bring the machine back, serve until the session is put away. RecessErrors end it and are kept in
        `failure`; the log is then the truth and the next run starts from it."""
        try:
            await self._claim()
            if self._may_sleep_on():
                await self.held_desk.sleep_on(self.held_row)
                self.stopping = True
            else:
                await self.wake()
            while not self.stopping:
                await self._run_commands()
                if not self.stopping:
                    await self._step()
        except Fenced as exc:
            self.failure = exc
            await self.hand.kill(f"fenced: {exc.message}")
        except RecessError as exc:
            self.failure = exc
            await self._give_up(exc)
        finally:
            self.stopping = self._over = True
            try:
                await self.leave()
            finally:
                self._fail_commands()

    async def _claim(self) -> None:
        settings, clock, log = self.deps.settings, self.deps.clock, self.deps.log
        before = clock.monotonic_s()
        old = await log.get(self.session)
        next_state(old.state, "wake")
        row = await log.claim(
            self.session, settings.owner, settings.lease_s, now=clock.wall_s(), force=settings.embedded
        )
        self.lease = Lease(self.session, row.epoch, before + settings.lease_s, settings.margin_s)
        self.row, self.state = old, old.state
        self.desk = self.agent.desk = Desk(log, row, clock, self.deps.observer)
        await self.desk.load(row)
        self.watch = stopwatch_of(row.meta.get("worked"), clock.monotonic_s())
        self.by_hand = str(row.meta.get(byhand.META, ""))
        self.hand.machine_id = str(row.meta.get("machine", ""))
        self._renewer = asyncio.create_task(self._keep_lease(self.lease), name=f"lease-{self.session}")

    def _may_sleep_on(self) -> bool:
        """Whether what woke a frozen session is no reason to bring its machine up. Who gave a command wants it up."""
        desk, row = self.held_desk, self.held_row
        if row.state != "frozen" or self._commands:
            return False
        if self.by_hand and not desk.inbox.cancel:
            return True  # what came waits until the human hands the session back
        due = row.meta.get("due")
        return nothing_new(
            desk.inbox, desk.facts, consumed=row.consumed, due=due if isinstance(due, int | float) else None,
            now=self.deps.clock.wall_s(),
        )  # fmt: skip

    async def _keep_lease(self, lease: Lease) -> None:
        """Renew at a third of the lease. When that fails until the lease's end, the machine is ended by our own clock."""
        deps = self.deps
        while True:
            await deps.clock.sleep(deps.settings.lease_s / 3)
            before = deps.clock.monotonic_s()
            try:
                await deps.log.renew(self.session, lease.epoch, deps.settings.lease_s, now=deps.clock.wall_s())
                lease.ends = before + deps.settings.lease_s
                await self.hand.renewed()
            except Fenced as exc:
                self._fenced(exc)
                return
            except RecessError as exc:
                if lease.left_s(deps.clock.monotonic_s()) <= 0:
                    self._fenced(Fenced(f"session {self.session}: the lease ended and could not be renewed: {exc}"))
                    return

    def _fenced(self, why: Fenced) -> None:
        """The log refuses us, or the lease's end has come: stop at once. The gate closes here and now; the VM is ended
        by the actor. Once the lease was given back, a late line of the agent is refused too, and that is all."""
        if self.stopping:
            return
        if self.lease is not None:
            self.lease.lost = True
        self.failure = why
        self._bell.set()

    async def wake(self) -> None:
        """Bring the machine back (also again, after it died)."""
        desk, row = self.held_desk, self.held_row
        self.config = check_config((await self.deps.agents.get(row.agent, desk.code_version)).config)
        self.woken = await wake(self)
        self.death, self.ended_job = "", None
        self.oom_kills = await oom_kills(self)
        await self.look_at_machine()
        await report(self)  # of a turn that ended just before a crash
        self.touch()

    async def look_at_machine(self) -> None:
        """Note what the machine is by now."""
        self.memory_bytes = (await self.deps.machines.get(self.hand.machine_id)).spec.memory_bytes

    async def _step(self) -> None:
        self._bell.clear()
        if isinstance(self.failure, Fenced):
            raise self.failure
        move = decide(await self._view())
        match move.act:
            case Act.WAIT:
                await wait_event(self._bell, move.seconds, self.deps.clock)
            case Act.END_TURN:
                await moves.end_turn(self)
                self.touch()
            case Act.TELL_CANCEL:
                await moves.tell_cancel(self)
            case Act.CANCEL_TURN:
                await moves.cancel_turn(self)
                self.touch()
            case Act.ANSWER:
                await moves.answer(self)
            case Act.FAIL_TURN:
                await moves.fail_turn(self, move.why)
                self.touch()
            case Act.REDELIVER | Act.START_TURN:
                await moves.deliver(self, move.act)
            case Act.UPGRADE | Act.CUT_FOR_UPGRADE:
                await moves.upgrade(self, move.act)
            case Act.RESTART_AGENT:
                await moves.restart_agent(self)
            case Act.PARK:
                await moves.park(self)
            case Act.UNPARK:
                await moves.unpark(self)
            case Act.FREEZE:
                await moves.put_away(self)
            case Act.SNAPSHOT:
                await moves.keep_snapshot(self)
            case Act.RECOVER:
                await moves.recover(self)
            case Act.GROW:
                await moves.grow(self)

    async def _view(self) -> View:
        desk, settings = self.held_desk, self.deps.settings
        await desk.look()
        facts, channel = desk.facts, self.agent.channel
        if desk.inbox.steers and channel is not None and channel.seen < desk.inbox.steers[-1]:
            await self.agent.catch_up()
        now = self.deps.clock.monotonic_s()
        self._look_for_stop(now)
        deployed = await self.deps.agents.current(self.held_row.agent)
        newest = check_config(deployed.config)
        policy = newest.policy
        wants = 0
        if policy == "contract" and desk.inbox.queue and deployed.version != desk.code_version:
            wants = await contract_of(self.deps.log, self.session, desk.inbox.queue[0])
        contracts = Contracts(wants, self.config.contract, newest.contract)
        self.agent.watched = self.config.snapshot in ("tool", "seconds")
        return View(
            state=self.state,
            machine_alive=self.hand.alive,
            agent_alive=self.job.alive,
            agent_failed=self.agent_failed,
            agent_ended=self.ended_job is not None,
            waiting=self.agent.waiting,
            done=channel.done if channel else 0,
            turn=facts.turn,
            turn_open=facts.open,
            turn_cut=facts.cut,
            cuts=facts.cuts,
            inbox=not facts.open and bool(desk.inbox.queue),
            holds=len(self.agent.holds),
            idle_s=self.idle_s,
            idle_timeout_s=settings.idle_timeout_s if self.config.idle_s is None else self.config.idle_s,
            park_s=settings.park_s,
            suspend_wanted=self.suspend_wanted,
            freeze_blocked_s=max(0.0, self.no_freeze_before_s - now),
            upgrade_to=upgrade_target(desk.code_version, deployed.version, policy, contracts),
            policy=policy,
            cancel=bool(self.stop[0]),
            by_hand=bool(self.by_hand),
            oom=0 < facts.oom_bytes == self.memory_bytes,
            may_grow=self.config.larger_bytes(self.memory_bytes) > 0,
            limit_in_s=self._limit_in_s(),
            cancel_told=channel is None or channel.cancelled == facts.turn,
            cancel_s=max(0.0, settings.cancel_s - (now - self._cancel_seen[1])),
            rest_s=settings.rest_s,
            due_near_s=settings.due_near_s,
            snapshot_in_s=snapshot_in(
                self.config.snapshot,
                self.config.snapshot_s,
                last_snapshot=desk.snapshotted,
                last_work=facts.last_work,
                last_outcome=facts.last_outcome,
                turn_open=facts.open,
                since_s=now - self.snapshot_s,
            ),
            **self._rest(facts),
        )

    def _look_for_stop(self, now: float) -> None:
        """See whether the open turn is to be ended, by whom, and since when that is so."""
        desk = self.held_desk
        facts, at_work = desk.facts, self.job.alive and not self.agent.resting and not self.agent.waiting
        self.watch = self.watch.tick(now, turn=facts.turn, at_work=facts.open and at_work)
        desk.limits = self.config.limits
        over = desk.excess(self.watch.seconds)
        cause = desk.inbox.cancel
        if cause:
            self.stop = ("cancelled", desk.inbox.why)
        elif facts.open and self.by_hand:
            self.stop, cause = ("cancelled", f"a human took over: {self.by_hand}"), -2 * facts.turn
        elif over:
            self.stop, cause = ("failed", over), -2 * facts.turn - 1
        else:
            self.stop = ("", "")
        desk.stopping = facts.open and bool(self.stop[0])
        if cause != self._cancel_seen[0]:
            self._cancel_seen = (cause, now)

    def _limit_in_s(self) -> float | None:
        wall_s = self.config.limits.wall_s
        return None if wall_s is None or not self.held_desk.facts.open else max(0.001, wall_s - self.watch.seconds)

    def _rest(self, facts: TurnFacts) -> dict[str, Any]:
        """The part of the view that is about an agent that waits in its turn."""
        requests = self.agent.waits().values()
        waits, inside = [one.refs for one in requests], {one.ref for one in requests}
        wall = self.deps.clock.wall_s()
        due = next_due(facts, waits)
        return {
            "calls_open": len(facts.calls.keys() - inside) if facts.open else 0,  # one that waits is not at work
            "resting": self.agent.resting,
            "ready": any(outcome(facts, refs, wall) is not None for refs in waits),
            "due_s": None if due is None else max(0.001, due - wall),
        }

    async def _begin(self, desk: Desk, request: Request) -> dict[str, Any]:
        if request.op == "fork":
            child = await self.command(lambda: fork_turn(self, request))
        else:
            child = await spawn(self.deps, desk, request)
        if request.body["text"]:
            self.wake_other(child)
        return {"session": child}

    async def _give_up(self, exc: RecessError) -> None:
        """A move failed for a reason that may pass: release the session as it is, its machine warm if it lives."""
        if self.desk is None:
            return
        with contextlib.suppress(RecessError):
            row = await self.deps.log.get(self.session)
            await self.save_meta(failure=exc.message)
            half_done = self.hand.alive or self.desk.facts.open
            state = self.state if half_done else "frozen" if row.snapshot else "cold"
            await self.deps.log.release(self.session, self.desk.epoch, state=state)

    # -- commands --------------------------------------------------------------------------------------------------

    async def detach(self) -> None:
        """Stop serving and leave the machine running for the next server (a command). In a cluster that server must come
        before the lease ends: then the keeper ends the machine, and another node takes the session."""
        self.stopping = True
        if not self.deps.settings.embedded:
            return
        await self.deps.log.release(self.session, self.held_desk.epoch, state=self.state)
        with contextlib.suppress(RecessError):
            await self.deps.machines.set_deadline(self.hand.machine_id, None)

    async def close(self) -> None:
        """End the session for good: agent told, log closed, VM gone (a command)."""
        next_state(self.state, "close")
        self.stopping = True
        await self.agent.shut("the session is closed")
        await self.deps.log.close(self.session, self.held_desk.epoch)
        await self.hand.kill("session closed")

    async def answering(self) -> None:
        """See that the machine runs and answers; a wish to suspend is overruled (a command). Raises Unavailable if it
        does not: it is ended then, and the next wake brings back what is stored."""
        if self.suspend_wanted:
            self.suspend_failed(IllegalState(f"session {self.session} was resumed meanwhile"))
        if self.state == "parked":
            await moves.unpark(self)
        self.touch()
        if not await self.hand.answers():
            raise Unavailable(f"session {self.session}: its machine does not answer: {self.death or 'it was ended'}")

    async def want_suspend(self) -> None:
        """Put away at the next boundary, whatever the idle time says (a command)."""
        self.suspend_wanted = True
        self._refused = asyncio.get_running_loop().create_future()

    async def suspended(self) -> None:
        """Wait for ever, or raise what the store said to the freeze that was asked for."""
        if self._refused is not None:
            await asyncio.shield(self._refused)

    def suspend_failed(self, exc: RecessError) -> None:
        """A freeze was refused; an explicit wish is answered with it and not repeated."""
        self.suspend_wanted = False
        if self._refused is not None and not self._refused.done():
            self._refused.set_exception(exc)
            self._refused.exception()  # seen: the wish may have been given up meanwhile

    async def set_state(self, move: str) -> None:
        """Make a move of the table and write it to the session's row."""
        self.state = next_state(self.state, move)
        await self.deps.log.update(self.session, self.held_desk.epoch, state=self.state)

    async def save_meta(self, **changes: Any) -> None:
        """Change the sessions room's own data in the row; a value of "" removes its key."""
        await self.held_desk.save_meta(**changes)

    async def leave(self) -> None:
        """Stop acting on everything; nothing in the machine is touched. May be called twice. Before anything is waited for no
        agent is let in any more: one that talked to a server which was cut off in here would get no answer, for ever."""
        await self.agent.close()
        renewer, self._renewer = self._renewer, None
        if renewer is not None:
            renewer.cancel()
            await asyncio.gather(renewer, return_exceptions=True)
        await self.job.forget()
        await self.hand.let_go()

    # -- what comes from the machine -------------------------------------------------------------------------------

    async def _handler(self, service: str, metadata: Any, stream: Any) -> None:
        await self.agent.handler(service, metadata, stream)

    def _agent_ended(self, ended: Ended) -> None:
        self.ended_job = ended
        self.agent_failed = ended.exit_code != 0
        self._bell.set()

    def _machine_died(self, reason: str) -> None:
        self.death = reason
        self._bell.set()

    # -- inside ----------------------------------------------------------------------------------------------------

    @property
    def held_desk(self) -> Desk:
        """The desk; only after the claim."""
        if self.desk is None:
            raise IllegalState(f"session {self.session} is not claimed here")
        return self.desk

    @property
    def held_lease(self) -> Lease:
        """The lease; only after the claim."""
        if self.lease is None:
            raise IllegalState(f"session {self.session} is not claimed here")
        return self.lease

    @property
    def held_row(self) -> SessionRow:
        """The row as it was before the last wake; only after the claim."""
        if self.row is None:
            raise IllegalState(f"session {self.session} is not claimed here")
        return self.row

    async def _run_commands(self) -> None:
        while self._commands:
            work, future = self._commands.pop(0)
            try:
                result = await work()
            except RecessError as exc:
                if not future.done():
                    future.set_exception(exc)
            else:
                if not future.done():
                    future.set_result(result)

    def _fail_commands(self) -> None:
        while self._commands:
            _work, future = self._commands.pop(0)
            if not future.done():
                future.set_exception(self._put_away())

    def _put_away(self) -> Timeout:
        return Timeout(f"session {self.session} was put away meanwhile", hint="try again")
