"""Callbacks: what a session's log says is told to a URL, signed, at least once and in order, also after a restart.

A session asks for it by the label `callback`. Told are the ends of turns and questions. The id of a delivery is
`SESSION:POSITION`, so that who hears it twice can tell; how far one is told is a file per session, written after the other
side has said 2xx. A side that does not answer is asked again, ever more slowly, for a day; then that entry is passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from recess.clock import Clock
from recess.contextlog.contract import ContextLog, Entry, SessionRow
from recess.errors import BadInput, RecessError
from recess.sessions.signing import callback_key, signed

log = logging.getLogger(__name__)

LABEL = "callback"
KINDS = {"turn.end": "session.turn_end", "ask": "session.ask"}
PAGE = 200
WAIT_S = 30.0
POST_S = 10.0
RETRY_S = (1.0, 5.0, 30.0, 120.0, 600.0)  # the last one again and again
GIVE_UP_S = 86400.0
URL_CHARS_MAX = 2000

Post = Callable[[str, Mapping[str, str], bytes], Awaitable[int]]  # returns the status, 0 for no answer


def check_url(url: str) -> str:
    """Return a callback's URL. Raises BadInput."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or len(url) > URL_CHARS_MAX:
        raise BadInput("callback: an http or https URL without a user is needed")
    return url


def message_of(entry: Entry) -> bytes:
    """Return what is told of an entry."""
    told = {
        "type": KINDS[entry.kind], "session": entry.session, "position": entry.position, "turn": entry.turn,
        "ref": entry.ref, "data": dict(entry.body), "timestamp": entry.ts,
    }  # fmt: skip
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "replace")


async def post(url: str, headers: Mapping[str, str], body: bytes) -> int:
    """POST once; redirects are not followed."""
    return await asyncio.to_thread(_post, url, headers, body)


def _post(url: str, headers: Mapping[str, str], body: bytes) -> int:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(str(parts.hostname), parts.port, timeout=POST_S)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body, {"Content-Type": "application/json", **headers})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


class Callbacks:
    """One task a session that wants them. `folder` holds how far each was told."""

    def __init__(self, store: ContextLog, clock: Clock, root: bytes, folder: Path, send: Post = post) -> None:
        self._log = store
        self._clock = clock
        self._root = root
        self._folder = folder
        self._send = send
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, row: SessionRow) -> None:
        """Tell of this session from where it was left, if it wants that. May be called again."""
        url = str(row.labels.get(LABEL, ""))
        if not url or row.id in self._tasks:
            return
        task = self._tasks[row.id] = asyncio.create_task(self._tell(row, url), name=f"callback-{row.id}")
        task.add_done_callback(lambda _: self._tasks.pop(row.id, None))

    async def close(self) -> None:
        """Stop; the next server goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, row: SessionRow, url: str) -> None:
        place = self._place(row)
        while True:
            try:
                entries = await self._log.read(row.id, after=place, limit=PAGE)
                closed = not entries and (await self._log.get(row.id)).state == "closed"
            except RecessError as exc:
                log.warning("callbacks of %s: %s", row.id, exc.message)
                await self._clock.sleep(RETRY_S[-1])
                continue
            if closed:
                return
            for entry in entries:
                if entry.kind in KINDS:
                    await self._deliver(entry, row.id, url)
                    self._told(row.id, entry.position)
                place = entry.position
            if not entries:
                await self._log.wait(row.id, place, WAIT_S)

    async def _deliver(self, entry: Entry, session: str, url: str) -> None:
        body, key = message_of(entry), callback_key(self._root, session)
        tries = 0
        while True:
            headers = signed(key, f"{session}:{entry.position}", self._clock.wall_s(), body)
            if 200 <= await self._send(url, headers, body) < 300:
                return
            if self._clock.wall_s() - entry.ts > GIVE_UP_S:
                log.warning("callback of %s, entry %d: nobody took it for a day", session, entry.position)
                return
            await self._clock.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
            tries += 1

    def _place(self, row: SessionRow) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self._folder / row.id).read_text())
        return row.fork_position  # a fork's past was told by its parent

    def _told(self, session: str, position: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = self._folder / f".{session}"
            beside.write_text(str(position))
            beside.replace(self._folder / session)
        except OSError as exc:  # it is told once more then
            log.warning("callbacks of %s: %s", session, exc)
