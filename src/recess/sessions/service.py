"""`Sessions`: what the API, the CLI and the node use. It owns the live supervisors and nothing else.

A message is durable before anything else happens: `send` appends to the inbox and returns the position; waking a
machine is the supervisor's business. Refs are ids, names or unambiguous id prefixes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from recess.catalog import AgentVersion
from recess.contextlog.blobs import gone
from recess.contextlog.contract import Appended, Blob, Entry, Piece, SessionRow
from recess.errors import BadInput, Fenced, IllegalState, NotFound, RecessError, Timeout, Unavailable
from recess.ids import new_id
from recess.machines.retention import Holds
from recess.sessions import branching, byhand, ledger, talking
from recess.sessions.agent_config import check_config, config_from_source
from recess.sessions.alarms import Alarms
from recess.sessions.callbacks import LABEL, Callbacks, check_url
from recess.sessions.cost import Cost, cost_of
from recess.sessions.deps import Deps
from recess.sessions.following import Feed, Place
from recess.sessions.following import Piece as Spoken
from recess.sessions.holding import snapshot_holds
from recess.sessions.lease import LeaseGate
from recess.sessions.schedules import Schedules
from recess.sessions.supervisor import Supervisor

log = logging.getLogger(__name__)

FOLLOW_S = 15.0
READ_BYTES = 8 << 20  # bodies in one page of a log
RETRIES_S = (0.5, 2.0, 5.0, 15.0)
SUSPEND_S = 120.0
STOP_S = 10.0
RETRY_LATER_S = 60.0  # a session with work that does not come up is tried again as long as this server lives
RESUME_TRIES = 5
OPEN_STATES = ("running", "parked", "frozen", "cold")


class Sessions:
    """See the module. Construct once, `recover()` at server start, `shutdown()` at its end."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self.gate = LeaseGate(deps.clock)
        self._live: dict[str, Supervisor] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._alarms = Alarms(deps.clock, self._wake)
        self._schedules = Schedules(deps, self._wake)
        self._again: set[str] = set()  # woken while their supervisor was ending: the next one starts when it has
        self._closing = False
        self.callbacks: Callbacks | None = None  # set by the node that has a place for them

    # -- agents ----------------------------------------------------------------------------------------------------

    async def deploy(
        self, name: str, files: Mapping[str, str | bytes], config: Mapping[str, Any] | None = None
    ) -> AgentVersion:
        """Store a version of agent code and make it current; live sessions take it by its policy. The entry file's
        `@agent(...)` literals are defaults under `config`. Raises BadInput."""
        raw = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        entry = str((config or {}).get("entry") or "agent.py")
        if entry not in raw:
            raise BadInput(f"agent {name}: no file {entry!r}", hint="the entry file is agent.py, or config entry=...")
        try:
            source = raw[entry].decode()
        except UnicodeDecodeError as exc:
            raise BadInput(f"agent {name}: {entry} is not UTF-8 text") from exc
        merged = {**config_from_source(source), **(config or {})}
        check_config(merged)
        version = await self._deps.agents.deploy(name, raw, merged, now=self._deps.clock.wall_s())
        for supervisor in self._live.values():
            supervisor.poke()
        if check_config(merged).cron or self._schedules.any:
            await self._schedules.look_all(row for row in await self._all_open() if row.agent == name)
        return version

    # -- sessions --------------------------------------------------------------------------------------------------

    async def start(
        self, agent: str, *, name: str = "", labels: Mapping[str, str] | None = None, eager: bool = False
    ) -> SessionRow:
        """Make a session of the agent's current version. `eager` brings its machine up at once, not at the first message; if
        that fails there is no session, and the name is free for the next try."""
        version = await self._deps.agents.current(agent)
        if labels and labels.get(LABEL):
            check_url(labels[LABEL])
        row = await self._deps.log.create(agent=agent, code_version=version.version, name=name, labels=labels)
        await self._schedules.look_all([row])
        self._call_back([row])
        if not eager:
            return row
        try:
            return await self.resume(row.id)
        except RecessError:
            with suppress(RecessError):
                if not (await self._deps.log.get(row.id)).head:  # else somebody has sent it something already
                    await self.close(row.id)
            raise

    async def send(
        self, ref: str, text: str, *, key: str = "", mode: str = "queue", body: Mapping[str, Any] | None = None,
        contract: int = 0,
    ) -> Appended:  # fmt: skip
        """Append a user message and wake the session. Durable when it returns; no machine need exist yet. The same
        `key` gives the old position. `mode`: queue | steer | interrupt (see `talking.message`). `contract`: the least that the
        code which takes it must have. Raises NotFound, IllegalState (closed), KeyReused, BadInput, Incompatible."""
        most = self._deps.settings.max_text_bytes
        draft = talking.message(text, key=key, mode=mode, body=body or {}, max_bytes=most, contract=contract)
        row = await self._deps.log.get(ref)
        if contract:
            await talking.check_contract(self._deps.agents, row, contract)
        done = await self._deps.log.append_inbox(row.id, draft)
        self._wake(row.id)
        return done

    async def cancel(self, ref: str, *, reason: str = "", turn: int | None = None, key: str = "") -> Appended:
        """Stop the open turn: the agent is asked to, and made to if it does not. Memory and machine stay; the next message
        begins the next turn. Raises IllegalState if there is no turn to stop."""
        row = await self._deps.log.get(ref)
        done = await talking.cancel(self._deps.log, row, reason=reason, turn=turn, key=key)
        self._wake(row.id)
        return done

    async def questions(self, ref: str) -> list[talking.Question]:
        """Return the questions that wait for a human."""
        return await talking.questions(self._deps.log, await self._deps.log.get(ref))

    async def answer(self, ref: str, question: str, text: str) -> Appended:
        """Answer a question (an `ask` entry's ref) and wake the session. Raises NotFound, BadInput, KeyReused (another
        answer was given before)."""
        row = await self._deps.log.get(ref)
        done = await talking.answer(self._deps.log, row, question, text)
        self._wake(row.id)
        return done

    async def get(self, ref: str) -> SessionRow:
        """Return a session's row; its `meta` tells machine and failure."""
        return await self._deps.log.get(ref)

    async def list_sessions(self, *, everything: bool = False) -> list[SessionRow]:
        """Return sessions, newest first; closed ones only with `everything`."""
        states = () if everything else OPEN_STATES
        return await self._deps.log.list_sessions(states=states)

    async def read(self, ref: str, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        """Return log entries in order: at most `limit`, and no more than READ_BYTES of them (but one). Whoever wants all goes
        on after the last, until there are none."""
        session = (await self._deps.log.get(ref)).id
        return await self._deps.log.read(session, after=after, limit=limit, max_bytes=READ_BYTES)

    async def blobs(self, ref: str) -> list[Blob]:
        """Return the blobs that a session's log names, newest first."""
        return await self._deps.log.find_blobs((await self._deps.log.get(ref)).id)

    async def blob(self, ref: str, digest: str) -> Blob:
        """Return one of a session's blobs. Raises NotFound, also for one of another session."""
        session = (await self._deps.log.get(ref)).id
        found = await self._deps.log.find_blobs(session, digest)
        if not found:
            raise gone(session, digest)
        return found[0]

    async def blob_piece(self, piece: Piece) -> bytes:
        """Return the bytes of a piece of a blob that `blob` gave. Raises Corrupt."""
        return await self._deps.log.get_piece(piece)

    async def feed(self, ref: str, place: Place | None = None) -> Feed:
        """Return a reader of a session that goes on from `place` (default: the beginning)."""
        return Feed(self._deps.log, (await self._deps.log.get(ref)).id, place)

    async def follow(self, ref: str, *, after: int = 0) -> AsyncIterator[Entry | Spoken]:
        """Yield entries after a position as they come, without gap or double, and the pieces of replies being streamed;
        ends when the session is closed and all is read."""
        feed = await self.feed(ref, Place(after))
        async for _place, item in feed.items(FOLLOW_S):
            yield item

    async def suspend(self, ref: str, *, timeout_s: float = SUSPEND_S) -> SessionRow:
        """Put a session away at its next turn boundary. Raises Timeout if it does not get there, and what the store
        said if the snapshot failed."""
        row = await self._deps.log.get(ref)
        supervisor = self._live.get(row.id)
        task = self._tasks.get(row.id)
        if supervisor is None or task is None:
            if row.state in ("frozen", "cold"):
                return row
            raise IllegalState(f"session {row.id} is {row.state} and not live here")
        await supervisor.command(supervisor.want_suspend)
        waiter = asyncio.create_task(supervisor.suspended())
        try:
            await asyncio.wait({waiter, task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if waiter.done():
                waiter.result()
            if not task.done():
                supervisor.suspend_wanted = False
                raise Timeout(f"session {row.id} was not idle within {timeout_s:.0f} s", hint="its turn goes on")
        finally:
            waiter.cancel()
            await asyncio.gather(waiter, return_exceptions=True)
        return await self._deps.log.get(row.id)

    async def resume(self, ref: str) -> SessionRow:
        """Bring a session's machine up, also without a message; returns when the machine answers. One that is just
        being put away is put away and brought back. Raises why it could not be."""
        return await self._in_actor(ref, lambda supervisor: supervisor.answering())

    async def take(self, ref: str, *, why: str = "") -> SessionRow:
        """Take a session over by hand: the turn at work is stopped, no other begins, the machine is brought up and is the
        human's until `hand_back`. Returns when no turn is open. What is sent meanwhile waits."""
        row = await self._in_actor(ref, lambda supervisor: byhand.take(supervisor, why))
        try:
            async with asyncio.timeout(SUSPEND_S):
                while (await talking.facts_of(self._deps.log, row)).open:
                    await self._deps.log.wait(row.id, row.head, FOLLOW_S)
                    row = await self._deps.log.get(row.id)
        except TimeoutError as exc:
            raise Timeout(
                f"session {row.id}: its turn did not end within {SUSPEND_S:.0f} s", hint="it is yours"
            ) from exc
        return row

    async def hand_back(self, ref: str, *, text: str = "", key: str = "") -> SessionRow:
        """Give a session back to its agent. `text`: a message to it, behind those that wait already. Raises IllegalState if nobody has taken it."""
        row = await self._in_actor(ref, byhand.hand_back)
        if text:
            await self.send(row.id, text, key=key)
        return await self._deps.log.get(row.id)

    async def _in_actor(self, ref: str, work: Callable[[Supervisor], Awaitable[None]]) -> SessionRow:
        """Bring a session's machine up and run `work` in its actor. Raises why it could not be."""
        row = await self._deps.log.get(ref)
        if row.state == "closed":
            raise IllegalState(f"session {row.id} is closed")
        failure: RecessError = Unavailable("this server is closing")
        for _ in range(RESUME_TRIES):
            supervisor = self._wake(row.id)
            if supervisor is None:
                break
            try:
                await supervisor.command(partial(work, supervisor))
                return await self._deps.log.get(row.id)
            except Unavailable as exc:
                failure = exc  # the actor sees that the machine is gone, and brings it back or puts the session away
            except Timeout as exc:
                failure = exc
                await supervisor.gone.wait()
            if supervisor.failure is not None:
                raise supervisor.failure
        raise failure

    async def fork(self, ref: str, *, at: int | None = None, name: str = "", eager: bool = False) -> SessionRow:
        """Fork log and machine together: at the head of a live session (its machine is snapshotted, it goes on), at
        the head of one that was put away, or at position `at`, with the newest snapshot that is not newer than it. The
        child is frozen and costs no machine until its first message, unless `eager`."""
        row = await self._deps.log.get(ref)
        supervisor = self._live.get(row.id)
        if at is None and supervisor is not None and not supervisor.stopping:
            try:
                child = await supervisor.command(lambda: branching.fork_live(supervisor, name))
            except Timeout:
                child = await branching.fork_stored(self._deps, row.id, None, name)  # it was just being put away
        else:
            child = await branching.fork_stored(self._deps, row.id, at, name)
        self._call_back([child])
        return await self.resume(child.id) if eager else child

    async def rewind(self, ref: str, *, to: int) -> SessionRow:
        """Take log and machine back to a position: what came after stays in the log and leaves the branch."""
        row = await self._deps.log.get(ref)
        await self._stop(row.id)
        self._alarms.set(row.id, None)
        return await branching.rewind(self._deps, row.id, to)

    async def close(self, ref: str) -> SessionRow:
        """End a session for good and give its machine back; the log can still be read. Closing twice is no error."""
        row = await self._deps.log.get(ref)
        if row.state == "closed":
            return row
        self._schedules.forget(row.id)
        supervisor = self._live.get(row.id)
        closed = False
        if supervisor is not None and not supervisor.stopping:
            try:
                await supervisor.command(supervisor.close)
                closed = True
            except Timeout:
                pass  # put away meanwhile
        await self._stop(row.id)
        self._alarms.set(row.id, None)
        if not closed:
            await self._deps.log.close(row.id)
        await branching.drop_machine(self._deps, await self._deps.log.get(row.id))
        return await self._deps.log.get(row.id)

    async def snapshots(self, ref: str) -> list[ledger.Kept]:
        """Return the snapshots on a session's branch, oldest first, with the turn each is of and what it cost."""
        row = await self._deps.log.get(ref)
        entries = await ledger.read(self._deps.log, row)
        named = {str(e.body.get("snapshot", "")) for e in entries if e.kind == "machine.snapshot"}
        return ledger.kept(entries, await self._deps.machines.stored_snapshots(named))

    async def cost(self, ref: str) -> Cost:
        """Return what a session has cost and saved so far, from its log (`ledger.ENTRIES_MAX` entries of it at most)."""
        row = await self._deps.log.get(ref)
        entries = await ledger.read(self._deps.log, row)
        named = {str(e.body.get("snapshot", "")) for e in entries if e.kind == "machine.snapshot"}
        return cost_of(
            row.id,
            entries,
            await self._deps.machines.stored_snapshots(named),
            self._deps.clock.wall_s(),
            closed=row.state == "closed",
        )

    @property
    def live(self) -> int:
        """How many sessions this server drives now."""
        return len(self._live)

    # -- activity --------------------------------------------------------------------------------------------------

    def touch(self, session: str) -> None:
        """Note activity on a session's machine (exec, a file operation): its idle time starts anew."""
        supervisor = self._live.get(session)
        if supervisor is not None:
            supervisor.touch()

    @contextmanager
    def activity(self, session: str, why: str) -> Iterator[None]:
        """Keep a session's machine awake while something is attached to it (a terminal, a published port)."""
        supervisor, token = self._live.get(session), new_id("act")
        if supervisor is not None:
            supervisor.agent.hold(token, why)
        try:
            yield
        finally:
            if supervisor is not None:
                supervisor.agent.release(token)

    # -- the server's life -----------------------------------------------------------------------------------------

    async def snapshot_holds(self, since: float) -> Holds:
        """Return the snapshots that sessions need, and those that their logs name since a wall time."""
        return await snapshot_holds(self._deps.log, since)

    async def recover(self) -> list[str]:
        """At server start: take back every session that some server left live, and wake those with unread messages or
        an open turn; set the alarms of those that wait for a time. Returns the ids of the woken. Machines of sessions
        that were put away half-way are ended."""
        woken: list[str] = []
        rows = await self._all_open()
        for row in rows:
            if not self._deps.settings.embedded and row.owner not in ("", self._deps.settings.owner):
                continue
            live = row.state in ("running", "parked")
            if not live:
                await branching.end_leftover(self._deps, row)
                self._alarms.set(row.id, due_of(row))
            if live or await self._deps.log.inbox_after(row.id, row.consumed):
                self._wake(row.id)
                woken.append(row.id)
        await self._schedules.look_all(rows)
        self._call_back(rows)
        return woken

    async def take_abandoned(self, limit: int) -> list[str]:
        """In a cluster: take up to `limit` sessions whose nodes have let their leases end, and wake them."""
        settings, clock = self._deps.settings, self._deps.clock
        rows = await self._deps.log.claim_abandoned(settings.owner, settings.lease_s, now=clock.wall_s(), limit=limit)
        for row in rows:
            log.info("session %s is taken over", row.id)
            self._wake(row.id)
        return [row.id for row in rows]

    async def rest_between_looks(self) -> None:
        """Wait for a third of a lease: so long a dead node's session waits at most beyond its lease."""
        await self._deps.clock.sleep(self._deps.settings.lease_s / 3)

    def heard(self, session: str) -> None:
        """Another node has changed a session ("": may have changed any): whoever drives it here looks at it."""
        for one in [session] if session else list(self._live):
            supervisor = self._live.get(one)
            if supervisor is not None:
                supervisor.poke()

    def _call_back(self, rows: Iterable[SessionRow]) -> None:
        if self.callbacks is not None:
            for row in rows:
                self.callbacks.follow(row)

    async def _all_open(self) -> list[SessionRow]:
        return await self._deps.log.list_sessions(states=OPEN_STATES, limit=100_000)

    async def shutdown(self, *, detach: bool = True) -> None:
        """Stop serving. `detach`: machines run on for the next server; else sessions are put away where that is
        possible within a short time, and what remains is left as it is."""
        self._closing = True
        await self._alarms.close()
        await self._schedules.close()
        if self.callbacks is not None:
            await self.callbacks.close()
        if not detach:
            waiting = [self._quiet_suspend(session) for session in list(self._live)]
            await asyncio.gather(*waiting)
        for session in list(self._live):
            await self._stop(session)

    async def abandon(self) -> None:
        """Drop everything without writing a word, as a crash does. For tests of what comes after."""
        self._closing = True
        await self._alarms.close()
        await self._schedules.close()
        if self.callbacks is not None:
            await self.callbacks.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._live.clear()
        self._tasks.clear()

    async def settled(self, session: str) -> None:
        """Wait until no supervisor drives the session here (it was put away, or there is nothing to do)."""
        while (task := self._tasks.get(session)) is not None:
            await asyncio.wait({task})

    def is_live(self, session: str) -> bool:
        """Tell whether this server drives the session now."""
        return session in self._live

    async def _quiet_suspend(self, session: str) -> None:
        try:
            await self.suspend(session, timeout_s=20.0)
        except RecessError as exc:
            log.warning("session %s stays as it is: %s", session, exc.message)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _wake(self, session: str) -> Supervisor | None:
        supervisor = self._live.get(session)
        if supervisor is not None:
            if supervisor.stopping:
                self._again.add(session)
            supervisor.poke()
            return supervisor
        if self._closing:
            return None
        return self._launch(session)

    def _launch(self, session: str) -> Supervisor:
        supervisor = Supervisor(self._deps, self.gate, session, self._wake)
        self._live[session] = supervisor
        self._tasks[session] = asyncio.create_task(self._drive(session, supervisor), name=f"session-{session}")
        return supervisor

    async def _drive(self, session: str, supervisor: Supervisor) -> None:
        """Run supervisors of one session until there is nothing to do: a message that came while one was ending, or a
        failure that may pass, starts the next."""
        tries = 0
        try:
            while True:
                await supervisor.run()
                failure = supervisor.failure
                work = await self._has_work(session, failed=failure is not None)
                # No await from here to the end of `finally`: who wakes the session is either in `_again` or finds none.
                if self._closing or not (work or session in self._again):
                    return
                self._again.discard(session)
                if failure is not None:
                    log.warning("session %s: %s", session, failure.message)
                    if isinstance(failure, Fenced):
                        return
                    if tries >= len(RETRIES_S):
                        self._alarms.set(session, self._deps.clock.wall_s() + RETRY_LATER_S)
                        return
                    await self._deps.clock.sleep(RETRIES_S[tries])
                    tries += 1
                if self._live.get(session) is not supervisor:
                    return
                ended, supervisor = supervisor, Supervisor(self._deps, self.gate, session, self._wake)
                self._live[session] = supervisor
                ended.gone.set()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("session %s: the supervisor broke", session)
        finally:
            if self._live.get(session) is supervisor:
                del self._live[session]
                self._tasks.pop(session, None)
                self._again.discard(session)
            supervisor.gone.set()

    async def _has_work(self, session: str, *, failed: bool) -> bool:
        try:
            row = await self._deps.log.get(session)
        except NotFound:
            return False
        if row.state == "closed":
            return False
        due = due_of(row) if row.state == "frozen" else None
        if not failed and not self._closing:
            self._alarms.set(session, due)
        late = due is not None and due <= self._deps.clock.wall_s()
        half_done = failed and (late or row.state in ("running", "parked"))
        return half_done or bool(await self._deps.log.inbox_after(session, row.consumed))

    async def _stop(self, session: str) -> None:
        """Stop the supervisor of a session and leave its machine as it is."""
        supervisor, task = self._live.get(session), self._tasks.get(session)
        if supervisor is None or task is None:
            return
        if not supervisor.stopping:
            with suppress(RecessError, TimeoutError):
                await asyncio.wait_for(supervisor.command(supervisor.detach), STOP_S)
        await asyncio.wait({task}, timeout=STOP_S)  # it cleans up after itself; cancelled only if it does not get there
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._live.pop(session, None)
        self._tasks.pop(session, None)


def due_of(row: SessionRow) -> float | None:
    """Return when a session that was put away must be woken (wall seconds), None if only by what comes in."""
    due = row.meta.get("due")
    return float(due) if isinstance(due, int | float) else None
