"""Messages that come by the clock: `@agent(cron={"0 9 * * 1-5": "Write the report"})`, for each session of the agent.

Nothing is stored but the messages themselves: a message's key names its expression and its time, so a time that is looked at
twice (a restart, two servers) is one message. After a pause of any length the newest missed time counts, older ones do not. A
session whose last such message still waits for its turn gets no other. It must know nothing of machines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from blake3 import blake3

from recess.catalog import AgentVersion
from recess.contextlog.contract import Draft, SessionRow
from recess.errors import IllegalState, KeyReused, NotFound, RecessError
from recess.sessions.agent_config import check_config
from recess.sessions.alarms import Alarms
from recess.sessions.cron import Cron, parse_cron
from recess.sessions.deps import Deps

log = logging.getLogger(__name__)

AGAIN_S = 60.0  # after a failure that may pass


class Schedules:
    """`wake(session)` is called when a message was appended."""

    def __init__(self, deps: Deps, wake: Callable[[str], object]) -> None:
        self._deps = deps
        self._wake = wake
        self._alarms = Alarms(deps.clock, self._ring)
        self._tasks: set[asyncio.Task[None]] = set()

    async def look(self, row: SessionRow) -> None:
        """Append what is due for a session and set the alarm for what comes next. Forks and children of other sessions have
        no schedule: the report is wanted once."""
        if row.parent or "spawned-by" in row.labels:
            return
        try:
            version = await self._deps.agents.current(row.agent)
            crons = {text: parse_cron(text) for text in check_config(version.config).cron}
            now = self._deps.clock.wall_s()
            due = [one for cron in crons.values() if (one := cron.next_after(now)) is not None]
            self._alarms.set(row.id, min(due, default=None))
            await self._append_due(row, version, crons, now)
        except (NotFound, IllegalState):
            self._alarms.set(row.id, None)  # its agent is gone, or it was closed
        except RecessError as exc:
            log.warning("session %s: its schedule: %s", row.id, exc.message)
            self._alarms.set(row.id, self._deps.clock.wall_s() + AGAIN_S)

    async def _append_due(self, row: SessionRow, version: AgentVersion, crons: Mapping[str, Cron], now: float) -> None:
        texts = check_config(version.config).cron
        since = max(row.created, version.created)  # what was before them was nobody's wish
        for text, cron in crons.items():
            due = cron.last_until(now)
            if due is None or due < since:
                continue
            waiting = await self._deps.log.inbox_after(row.id, row.consumed)
            if any(entry.body.get("cron") == text for entry in waiting):
                continue
            key = f"cron/{blake3(text.encode()).hexdigest()[:16]}/{int(due)}"
            body = {"text": texts[text], "cron": text, "due": due}
            try:
                done = await self._deps.log.append_inbox(row.id, Draft("user", body, key=key))
            except KeyReused:
                continue  # this time has had its message, by code of other words
            if not done.replayed:
                self._wake(row.id)

    async def look_all(self, rows: Iterable[SessionRow]) -> None:
        """Look at many sessions: those whose agent has a schedule."""
        has: dict[str, bool] = {}
        for row in rows:
            if row.agent not in has:
                with suppress(NotFound):
                    version = await self._deps.agents.current(row.agent)
                    has[row.agent] = bool(check_config(version.config).cron)
            if has.get(row.agent) or self._alarms.has(row.id):
                await self.look(row)

    @property
    def any(self) -> bool:
        """Whether some session waits for a time."""
        return self._alarms.any

    def forget(self, session: str) -> None:
        """A closed session gets no messages."""
        self._alarms.set(session, None)

    async def close(self) -> None:
        """Ring no more. May be called twice."""
        await self._alarms.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ring(self, session: str) -> None:
        task = asyncio.create_task(self._rung(session), name=f"cron-{session}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _rung(self, session: str) -> None:
        try:
            row = await self._deps.log.get(session)
        except NotFound:
            return
        except RecessError as exc:
            log.warning("session %s: its schedule: %s", session, exc.message)
            self._alarms.set(session, self._deps.clock.wall_s() + AGAIN_S)
            return
        if row.state != "closed":
            await self.look(row)
