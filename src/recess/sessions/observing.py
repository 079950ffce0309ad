"""Who wants to know what sessions do: told of each owner entry once it is durable, after the fact and without a say.

An observer never makes anybody wait, and what it raises is its own affair (`Observers` sees to it). It must know nothing of the log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from recess.contextlog.contract import Entry

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Keeps figures, or a trace. Both calls return at once."""

    def taken_up(self, session: str, entries: Sequence[Entry]) -> None:
        """This server drives a session from now on; `entries` are the end of its log, back to its newest turn at least."""
        ...

    def saw(self, session: str, entry: Entry) -> None:
        """An entry was appended here."""
        ...


class Observers:
    """Several as one. A broken observer is noted and does no harm."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        """Tell one more from now on."""
        self._observers.append(observer)

    def taken_up(self, session: str, entries: Sequence[Entry]) -> None:
        """See `Observer`."""
        for one in self._observers:
            with _kept_from_harm():
                one.taken_up(session, entries)

    def saw(self, session: str, entry: Entry) -> None:
        """See `Observer`."""
        for one in self._observers:
            with _kept_from_harm():
                one.saw(session, entry)


@contextlib.contextmanager
def _kept_from_harm() -> Iterator[None]:
    try:
        yield
    except Exception:  # what is looked at must not depend on who looks
        log.exception("an observer of sessions failed")
