"""The fault handler: brings absent pages when they are touched, and all the others right behind.

One thread waits for faults, which come first; another fills. A group is fetched once, by whoever comes first. Whatever
goes wrong (a frame that does not match its hash, a store that is gone) ends the serving with that error and nothing is
put there: the process that runs this must then end, and its end must end the machine. A page is never made up.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from recess.paging.book import Book, Library, Piece
from recess.paging.uffd import ProcessGone, Uffd

FILL_AFTER_S = 0.5
"""The fill leaves the machine's first moments to its faults: on few cores they would wait for it."""

FILL_GROUPS = 32
"""Asked for together by the fill unless it is told otherwise: 2 MiB of memory, one request where they lie together."""

_NICE = 10
_STUCK_S = 5.0  # for a fill that waits for a store, once nobody waits for it
_ABSENT, _ON_ITS_WAY, _THERE = 0, 1, 2


@dataclass
class Report:
    """What was done. `touched`: groups in the order in which faults asked for them. Bytes are stored ones."""

    faults: int = 0
    fault_bytes: int = 0
    bytes_read: int = 0
    groups: int = 0
    first_s: float = 0.0  # from the start to the first fault's answer
    filled_s: float = 0.0  # from the start to the last page
    touched: list[int] = field(default_factory=list)


class FaultServer:
    """Serves one memory until every absent page is there. `first`: groups to bring at once, before anybody asks;
    `owner` is a pidfd of the process whose memory it is: its end ends the serving, also while the fill waits for a store;
    `fill_groups`: how many the fill asks for together; `keep` is given every piece once it is there, from any thread, and raises nothing."""

    def __init__(
        self,
        uffd: Uffd,
        book: Book,
        library: Library,
        *,
        fill_after_s: float = FILL_AFTER_S,
        fill_groups: int = FILL_GROUPS,
        first: Iterable[int] = (),
        owner: int | None = None,
        keep: Callable[[Piece], None] | None = None,
    ) -> None:
        self._uffd = uffd
        self._book = book
        self._library = library
        self._fill_after_s = fill_after_s
        self._fill_groups = fill_groups
        self._first = first
        self._owner = owner
        self._keep = keep
        self._state = bytearray(book.groups)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._wake_read, self._wake_write = os.pipe()
        self._began = time.monotonic()
        self.report = Report()

    def run(self) -> Report:
        """Serve until all is there, or the process is gone. Raises what made it impossible to go on."""
        filler = threading.Thread(target=self._fill, name="fill", daemon=True)
        filler.start()
        gone = False
        try:
            self._answer()
        except ProcessGone:
            gone = True
        finally:
            self._ended.set()
            filler.join(_STUCK_S if gone else None)
            if not filler.is_alive():  # one that waits for a store yet would write into whatever has these numbers then
                os.close(self._wake_read)
                os.close(self._wake_write)
        if self._error is not None and not isinstance(self._error, ProcessGone):
            raise self._error
        return self.report

    def _answer(self) -> None:
        """Answer faults until the fill has ended. Raises ProcessGone."""
        poller = select.poll()
        poller.register(self._uffd.fd, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        if self._owner is not None:
            poller.register(self._owner, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_read in ready and (self._error is not None or self._uffd.fd not in ready):
                return
            if self._owner in ready:
                raise ProcessGone
            for fault in self._uffd.faults():
                self._bring_touched(fault.page)

    def _bring_touched(self, page: int) -> None:
        group = self._book.group_of(page)
        if group is None:
            raise RuntimeError(f"page {page} is waited for, but is not in the book")
        self.report.faults += 1
        read = self._bring(group)
        if read is None:
            if self._state[group] == _THERE:
                self._uffd.wake(page)  # it came in between; one that is on its way wakes whoever waits
            return
        self.report.touched.append(group)
        self.report.fault_bytes += read
        if self.report.first_s == 0.0:
            self.report.first_s = time.monotonic() - self._began

    def _bring(self, group: int) -> int | None:
        """Fetch a group and put it there, unless somebody has; return the stored bytes read."""
        with self._lock:
            if self._state[group] != _ABSENT:
                return None
            self._state[group] = _ON_ITS_WAY
        pieces, read = self._library.fetch(group)
        for piece in pieces:
            self._uffd.put(piece.first, piece.data)
        with self._lock:
            self._state[group] = _THERE
            self.report.bytes_read += read
            self.report.groups += 1
        keep = self._keep
        if keep is not None:
            for piece in pieces:
                keep(piece)
        return read

    def _fill(self) -> None:
        try:
            for group in self._first:
                self._bring(group)
            self._ended.wait(self._fill_after_s)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread only
            for low in range(0, self._book.groups, self._fill_groups):
                here = range(low, min(low + self._fill_groups, self._book.groups))
                absent = [group for group in here if self._state[group] == _ABSENT]
                self._library.prefetch(absent)
                for group in absent:
                    if self._ended.is_set():
                        return
                    self._bring(group)
            self.report.filled_s = time.monotonic() - self._began
        except BaseException as exc:
            self._error = exc
        finally:
            os.write(self._wake_write, b"x")
