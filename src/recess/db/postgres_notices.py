"""What nodes on one Postgres tell each other: words by LISTEN/NOTIFY. It must know no meaning of a word.

A word is a hint to look at the log at once. Who dies between a commit and its words tells nobody, and a listener whose
connection breaks misses some: then it says "" to its own, and everybody looks. Who waits looks now and then anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator

import psycopg

from recess.db.postgres_errors import one_line
from recess.db.postgres_link import Session, open_session
from recess.errors import RecessError

log = logging.getLogger(__name__)

PAYLOAD_MAX = 7000  # the server takes less than 8000 bytes
RETRY_S = 2.0


def payloads(node: str, words: Iterable[str]) -> Iterator[str]:
    """Yield payloads that carry all the words once each, and who says them."""
    line = node
    for word in dict.fromkeys(words):
        if len(line) + len(word) + 1 > PAYLOAD_MAX:
            yield line
            line = node
        line = f"{line} {word}"
    if line != node:
        yield line


class Listener:
    """A thread with a connection of its own that hears what other nodes say."""

    def __init__(self, url: str, schema: str, node: str) -> None:
        self._url = url
        self._node = node
        self._heard: list[Callable[[str], None]] = []
        self._session: Session | None = None
        self._lock = threading.Lock()  # orders `stop` against the thread's taking and closing of `_session`
        self._ended = threading.Event()
        self.ready = threading.Event()  # it hears whatever is said from now on
        self._thread = threading.Thread(target=self._run, name=f"recess-db-listen-{schema}", daemon=True)

    def add(self, heard: Callable[[str], None]) -> None:
        """Call this with each word, from this thread."""
        self._heard.append(heard)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, at once: a connection that is shut down is read to its end by the thread that waits for it."""
        with self._lock:
            self._ended.set()
            if self._session is not None:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._session.conn.fileno())) as raw:
                    raw.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        first = True
        while not self._ended.is_set():
            try:
                session = open_session(self._url)
            except RecessError as exc:
                log.warning("not listening for other nodes: %s", exc.message)
                self._ended.wait(RETRY_S)
                continue
            try:
                with self._lock:
                    self._session = None if self._ended.is_set() else session
                self._listen(session, first)
            except psycopg.Error as exc:
                if not self._ended.is_set():
                    log.warning("not listening for other nodes: %s", one_line(exc))
            finally:
                self.ready.clear()
                with self._lock:
                    self._session = None
                session.close()
            first = False

    def _listen(self, session: Session, first: bool) -> None:
        session.conn.execute(f"LISTEN {session.channel}")
        self.ready.set()
        if not first:
            self._tell("")
        while not self._ended.is_set():
            for notice in session.conn.notifies(timeout=RETRY_S, stop_after=1):
                said = notice.payload.split(" ")
                if said[0] != self._node:
                    for word in said[1:]:
                        self._tell(word)

    def _tell(self, word: str) -> None:
        for heard in tuple(self._heard):
            try:
                heard(word)
            except Exception:
                log.exception("a listener failed")
