"""The context log as the transcript store of the Claude Agent SDK: `ClaudeAgentOptions(session_store=LogStore(s), ...)`.

Fulfils that package's `SessionStore` protocol without its summaries, and imports nothing of it. Entries with a `uuid` that
is known are the ones we have: a batch that is sent again, also by a turn that was begun anew, adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recess_agent.records import Records
from recess_agent.session import Session

Key = Mapping[str, Any]  # project_key, session_id, subpath?
Line = dict[str, Any]


class LogStore:
    """Transcripts in the log. `name` keeps several stores of one session apart."""

    def __init__(self, session: Session, name: str = "main") -> None:
        self._session = session
        self._records = Records(session, f"transcripts.{name}")

    async def append(self, key: Key, entries: Sequence[Line]) -> None:
        """Append lines of a transcript."""
        known = {line.get("uuid") for line in self._lines().get(_name(key), [])}
        fresh = []
        for line in entries:
            if line.get("uuid") is None or line["uuid"] not in known:
                known.add(line.get("uuid"))
                fresh.append(dict(line))
        if fresh:
            await self._records.add(key=_name(key), lines=fresh, ms=_now_ms(self._session))

    async def load(self, key: Key) -> list[Line] | None:
        """Return a transcript, None for one that was never written."""
        return self._lines().get(_name(key))

    async def list_sessions(self, project_key: str) -> list[dict[str, Any]]:
        """Return {session_id, mtime in ms} of a project's transcripts, without those of sub-agents."""
        newest: dict[str, int] = {}
        there = self._lines()
        for one in self._records.all():
            project, session, *below = one["key"]
            if project == project_key and not below and [project, session] == list(one["key"]) and "lines" in one:
                newest[session] = max(newest.get(session, 0), int(one["ms"]))
        return [{"session_id": name, "mtime": ms} for name, ms in newest.items() if (project_key, name) in there]

    async def delete(self, key: Key) -> None:
        """Forget a transcript and, for a session's own, those of its sub-agents; the log keeps them."""
        await self._records.add(key=_name(key), delete=True)

    async def list_subkeys(self, key: Key) -> list[str]:
        """Return the sub-agents' paths below a session."""
        whole = _name(key)[:2]
        return [name[2] for name in self._lines() if len(name) == 3 and name[:2] == whole]

    def _lines(self) -> dict[tuple[str, ...], list[Line]]:
        found: dict[tuple[str, ...], list[Line]] = {}
        for one in self._records.all():
            name = tuple(one["key"])
            if one.get("delete"):
                for other in [other for other in found if other[: len(name)] == name]:
                    del found[other]
            else:
                found.setdefault(name, []).extend(one["lines"])
        return found


def _name(key: Key) -> tuple[str, ...]:
    parts = (str(key["project_key"]), str(key["session_id"]))
    return (*parts, str(key["subpath"])) if key.get("subpath") is not None else parts


def _now_ms(session: Session) -> int:
    """The host's time of the newest entry, plus one: the log orders what it holds, and two writes never have the same."""
    newest = session.log[-1:] or [{"ts": 0.0, "position": 0}]
    return int(float(newest[0].get("ts", 0.0)) * 1000) + int(newest[0]["position"])
