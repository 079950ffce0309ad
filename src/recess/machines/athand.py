"""Memories of this node's snapshots kept uncompressed, so that a restore maps them in place: what is kept, and when.

Kept is the memory of every snapshot taken here, from the capture that it was stored from, and of one that had to be read
from the store, from those verified pages. The writing is done behind everybody's back, by one thread of low priority; what
comes while that is busy for long is not kept. It is a cache: nothing waits for it, nothing depends on it.

What it must never know: how pages are stored, names of machines, sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from recess.errors import RecessError
from recess.frames.pool import give_way
from recess.machines.contract import Capture, MappedMemory, PageSet, TemplateRef
from recess.paging.book import Numbers, Pages, runs_of
from recess.paging.pagefiles import PageFiles
from recess.units import MIB, PAGE_BYTES

WAITING_BYTES_MAX = 512 * MIB
"""Pages that wait to be written are memory: beyond this (but for one snapshot's) they are not kept."""

_NICE = 15

log = logging.getLogger(__name__)


class AtHand:
    """The kept memories of one node. Calls that keep return at once; `close` ends the writing."""

    def __init__(self, files: PageFiles) -> None:
        self._files = files
        self._thread = ThreadPoolExecutor(1, "page-files", give_way, (_NICE,))
        self._waiting: dict[Future[None], int] = {}
        self._lock = threading.Lock()

    def find(self, snapshot_id: str, template: TemplateRef) -> MappedMemory | None:
        """Return a snapshot's memory ready to be mapped, or None. Reads a small file."""
        found = self._files.find(snapshot_id, template.id)
        return None if found is None else MappedMemory(found.files, found.runs, found.strays, found.owner)

    def keep_capture(self, snapshot_id: str, template: TemplateRef | None, capture: Capture) -> None:
        """Keep the memory that a snapshot was stored from; the capture may be closed right after this."""
        if capture.memory_file < 0 or capture.base != "template" or template is None:
            return
        parent, total = capture.parent, capture.memory_pages_total
        numbers = np.frombuffer(bytes(capture.memory.indices), "<u4")
        file = os.dup(capture.memory_file)

        def work() -> None:
            try:
                data = _map_pages(file, len(numbers))
                self._files.add(snapshot_id, template.id, total, numbers, data, ground(template.ram), parent=parent)
            finally:
                os.close(file)

        self._later(work, lambda: os.close(file), len(numbers) * PAGE_BYTES)

    def keep_pages(self, snapshot_id: str, template: TemplateRef | None, pages: PageSet, pages_total: int) -> None:
        """Keep all that differs from the template, as it was read."""
        if template is None or self._files.has(snapshot_id):
            return

        def work() -> None:
            numbers = np.frombuffer(pages.indices, "<u4")
            data = np.frombuffer(pages.data, np.uint8).reshape(-1, PAGE_BYTES)
            self._files.add(snapshot_id, template.id, pages_total, numbers, data, ground(template.ram))

        self._later(work, lambda: None, pages.data.nbytes)

    def keep_file(self, snapshot_id: str, template_id: str, pages_total: int, ranges: bytes, file: int) -> None:
        """Keep what a pager has written down: the pages of `ranges` (u32 first page, u32 count), back to back."""
        rows = np.frombuffer(ranges, "<u4").reshape(-1, 2).astype(np.int64)
        counts = rows[:, 1]
        inner = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers = (np.repeat(rows[:, 0], counts) + inner).astype(np.uint32)
        self._files.adopt(snapshot_id, template_id, pages_total, numbers, file)

    def drop(self, snapshot_id: str) -> None:
        """Forget a snapshot that was removed."""
        self._later(lambda: self._files.drop(snapshot_id), lambda: self._files.drop(snapshot_id), 0)

    def keep_only(self, snapshot_ids: Iterable[str]) -> None:
        """Forget all snapshots but these."""
        self._files.keep_only(snapshot_ids)

    def give_back(self, wanted: int) -> int:
        """Give disk space back, oldest use first; returns how much."""
        return self._files.give_back(wanted)

    def empty(self) -> int:
        """Give everything back; returns how much. What is written at this moment stays."""
        return self._files.give_back(self._files.used_bytes())

    def about(self) -> Mapping[str, int]:
        """Say what it holds and how often it helped."""
        return {"bytes": self._files.used_bytes(), **asdict(self._files.counts)}

    def _later(self, work: Callable[[], None], otherwise: Callable[[], None], size: int) -> None:
        """Have it done by the thread, unless too much waits or it has ended: then `otherwise`, now."""
        future: Future[None] | None = None
        with self._lock:
            waiting = sum(self._waiting.values())
            if not size or not waiting or waiting + size <= WAITING_BYTES_MAX:
                with contextlib.suppress(RuntimeError):  # it was closed
                    future = self._thread.submit(_quietly, work)
                    self._waiting[future] = size
        if future is None:
            otherwise()
        else:
            future.add_done_callback(partial(self._done, otherwise))

    def _done(self, otherwise: Callable[[], None], future: Future[None]) -> None:
        with self._lock:
            self._waiting.pop(future, None)
        if future.cancelled():
            otherwise()

    async def settled(self) -> None:
        """Return when everything that was to be kept so far is."""
        await asyncio.gather(*(asyncio.wrap_future(future) for future in list(self._waiting)), return_exceptions=True)

    def close(self) -> None:
        """Give up what is being written and what waits. May be called twice."""
        self._files.close()
        self._thread.shutdown(cancel_futures=True)


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except (RecessError, OSError, ValueError) as exc:
        log.warning("a snapshot's memory was not kept at hand: %s", exc)


def _map_pages(file: int, count: int) -> Pages:
    """Return the first `count` pages of a file, mapped as long as they are used."""
    if not count:
        return np.empty((0, PAGE_BYTES), np.uint8)
    mapping = mmap.mmap(file, count * PAGE_BYTES, prot=mmap.PROT_READ)
    return np.frombuffer(mapping, np.uint8).reshape(-1, PAGE_BYTES)


def ground(ram: Path) -> Callable[[Numbers], Pages]:
    """Return what reads a template's pages: by calls and not through a mapping, which would fill the file's holes."""

    def read(numbers: Numbers) -> Pages:
        out = np.zeros((len(numbers), PAGE_BYTES), np.uint8)
        starts, counts = runs_of(numbers)
        with ram.open("rb") as file:
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                place = out[start : start + count].reshape(-1).data
                os.preadv(file.fileno(), [place], int(numbers[start]) * PAGE_BYTES)
        return out

    return read
