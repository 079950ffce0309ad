"""What a turn may wait for while the machine is put away: a human's answer, a time, a child session.

Each wait has a name (`ref`) made of what it is about and not of the attempt: a turn that is begun anew after a crash finds
its question, its time or its child again. It knows the wire's words and nothing of tools or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from recess_agent.cancelling import Stop

Json = dict[str, Any]
Request = Callable[..., Awaitable[Json]]
Append = Callable[..., Awaitable[Json]]
IN_CALL: ContextVar[str] = ContextVar(
    "IN_CALL", default=""
)  # the tool call at work: one that waits keeps no machine up
RETRY_S = 30.0
RETRY_MOST_S = 3600.0


class Report:
    """How a child session's first turn ended. `status`: done | failed | cancelled."""

    def __init__(self, body: Json) -> None:
        self.session = str(body.get("session", ""))
        self.text = str(body.get("text", ""))
        self.status = str(body.get("status", "done"))
        self.error = str(body.get("error", ""))


class Waits:
    """The waits of one turn. `stop` ends them all."""

    def __init__(self, turn: int, request: Request, append: Append, stop: Stop) -> None:
        self._turn = turn
        self._request = request
        self._append = append
        self._stop = stop
        self._named: dict[str, int] = {}

    def name(self, kind: str, *about: Any) -> str:
        """Return the ref of a wait: the same in every attempt that asks the same things in the same order."""
        digest = hashlib.sha256(repr((self._turn, kind, about)).encode("utf-8", "replace")).hexdigest()[:12]
        count = self._named[digest] = self._named.get(digest, 0) + 1
        return f"{kind}-{digest}-{count}"

    async def ask(
        self, text: str, choices: Sequence[str], timeout: float | None, show: bool, ref: str = "", **more: Any
    ) -> str | None:
        """Ask and wait; None when nobody answered in time."""
        self._stop.check()
        ref = ref or self.name("ask", text, tuple(choices))
        body: Json = {"text": text, **more}
        if choices:
            body["choices"] = list(choices)
        if show:
            body["show"] = True
        await self._append("ask", body, ref=ref)
        refs = [ref]
        if timeout is not None:
            refs.append(f"{ref}-t")
            await self._append("timer", {"seconds": float(timeout)}, ref=refs[1])
        found = await self._wait(refs)
        return str((found.get("body") or {}).get("text", "")) if found.get("ref") == ref else None

    async def sleep(self, seconds: float, ref: str = "") -> None:
        """Wait for a time."""
        self._stop.check()
        ref = ref or self.name("sleep")
        await self._append("timer", {"seconds": max(0.0, float(seconds))}, ref=ref)
        await self._wait([ref])

    async def spawn(self, agent: str, text: str, ref: str = "") -> Report:
        """Start a child session and wait for its report."""
        self._stop.check()
        ref = ref or self.name("child", agent, text)
        await self._request("spawn", ref=ref, agent=agent, text=text, turn=self._turn)
        return Report(dict((await self._wait([ref])).get("body") or {}))

    async def _wait(self, refs: list[str]) -> Json:
        return await self._stop.race(self._request("wait", refs=refs, turn=self._turn, call=IN_CALL.get()))


def retry_delay(error: BaseException, default: float, most: float) -> float:
    """Return how long to wait before the call that raised `error` is made again; raises it if that is of no use.

    `error.retry_after` (seconds) is what the other side asked for; `error.retryable` False says that it is of no use.
    """
    if getattr(error, "retryable", True) is False:
        raise error
    asked = getattr(error, "retry_after", None)
    seconds = float(asked) if isinstance(asked, (int, float)) and asked >= 0 else default
    if seconds > most:
        raise error
    return seconds
