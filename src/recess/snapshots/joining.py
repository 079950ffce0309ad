"""Old layers are joined beside the machine's life, not inside a snapshot of it.

After a snapshot is durable, a thread of its own looks at the layers it names. Where too many are small, or one is mostly
dead weight (`rewrite.joins`), their live pages are written into a layer of their own. No manifest changes: they are
immutable, and their ids are in names, logs and forks. The *next* snapshot of that line refers to the joined layer instead of
the old ones, for a page that is in a slot of an old layer is, byte for byte, in a slot of the new one; and a child uses of an
old layer no slot that its parent did not use. So a snapshot's own time is that of its own pages.

Crash-safe because nothing depends on it. A crash before the layer has its name leaves a temporary file; after it, a layer
that no manifest names, like that of any snapshot that did not get to its manifest: both are swept. What is joined is known in
memory only, and its layer held by a pin until a snapshot has named it or it is forgotten; it is never deleted here, for
another snapshot may have come to the very same file by itself. Who takes it looks whether it is there, and renews its
time, so that a sweep of another process that has listed it as old leaves it (`sweep`).

A process that ends too soon joins nothing, and the next one's snapshots rewrite as they go (`rewrite.rewrites`, which also
bounds what may gather here while there is no time to join).

No snapshot waits for it. While one is taken or written the thread stands still, at the next 4 MiB of content. By then all but
as much of what it wrote is on the disk: a snapshot's fsync waits for whatever the file system's journal holds of others, which on
a slow disk could be all of a joined layer. For as long as a piece took to be written the disk is then left to others. (No
idle I/O priority: what is starved in the journal is what a snapshot's fsync would wait for.)

Crash points. joining.window: before each piece; joining.before_file, joining.stored: before the layer has its name, and
after; joining.held: the next snapshot is about to refer to it; joining.named: it does.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from recess.blobs import BlobStore, Draft, draft_of
from recess.crashpoints import crash_point
from recess.errors import NotFound, RecessError
from recess.frames import WorkPool
from recess.frames.pool import give_way
from recess.snapshots.classify import fingerprints
from recess.snapshots.contract import PageData
from recess.snapshots.keys import LAYER, digest_of, key_of, keys_of, make_id
from recess.snapshots.layer_v1 import build_layer
from recess.snapshots.manifest_v1 import FileV1
from recess.snapshots.pagemap import KIND_LAYER, PageMap, Source, distinct, union
from recess.snapshots.publish import Pins
from recess.snapshots.reader import OpenSnapshot
from recess.snapshots.recall import Recall
from recess.snapshots.rewrite import Usage, joins
from recess.units import MIB

_READY_MAX = 64  # joined layers that wait for their snapshot; one that comes later joins again
_READY_BYTES_MAX = 256 * MIB
_WAITING_MAX = 8  # jobs; a line that finds no room asks again with its next snapshot
_WINDOW_PAGES = 1024  # read at a time: 4 MiB
_AHEAD_BATCHES = 4  # packed and not yet written: 2 MiB
_FLUSH_BYTES = 4 * MIB  # at most on their way to the disk, but for a frame
_REST_MAX_S = 2.0
_NICE = 5  # not the lowest: it holds the interpreter now and then, and whoever waits for that waits for it

Slots = NDArray[np.int64]
Moves = Mapping[Source, tuple[Slots, Slots]]  # per old layer: slots, ascending, and where their pages are now


@dataclass(frozen=True)
class Joined:
    """A layer that holds what snapshot `of` uses of other layers. Durable, and named by no manifest yet."""

    of: str
    file: FileV1
    moves: Moves

    @property
    def source(self) -> Source:
        """It, as a page map names it."""
        return Source(KIND_LAYER, bytes.fromhex(digest_of(self.file.id)))


def moved(page_map: PageMap, joined: Sequence[Joined]) -> PageMap:
    """Return the same map with each page in a joined layer that has it. Pure."""
    source, position, sources = page_map.source.copy(), page_map.position.copy(), list(page_map.sources)
    for one in joined:
        sources.append(one.source)
        for old, (slots, places) in one.moves.items():
            if old not in page_map.sources or not len(slots):
                continue
            rows = np.flatnonzero(source == 1 + page_map.sources.index(old))
            at = np.minimum(np.searchsorted(slots, position[rows]), len(slots) - 1)
            there = slots[at] == position[rows]
            source[rows[there]] = len(sources)
            position[rows[there]] = places[at[there]]
    return union([PageMap(page_map.pages_total, page_map.pages, source, position, tuple(sources))])


@dataclass(frozen=True)
class _Selection:
    """What goes into one joined layer: `owners` and `content` in the order of its slots."""

    owners: list[tuple[str, NDArray[np.uint32]]]
    content: PageMap
    moves: Moves


def select(maps: Mapping[str, PageMap], layers: Sequence[FileV1], counts: Mapping[str, int]) -> _Selection:
    """Return what to join: of each of these layers the first so many slots that the maps use, each once. Pure."""
    entries = {Source(KIND_LAYER, bytes.fromhex(digest_of(f.id))): f.entries for f in layers if f.id in counts}
    chosen = sorted(entries)
    number = {source: n for n, source in enumerate(chosen)}
    picked, keys = [], []
    for name in sorted(maps):
        page_map = maps[name]
        table = np.array([-1, *(number.get(source, -1) for source in page_map.sources)], np.int64)
        mine = page_map.select(table[page_map.source] >= 0)
        picked.append((name, mine))
        keys.append(table[mine.source] << 32 | mine.position.astype(np.int64))
    joined = np.concatenate([*keys, np.empty(0, np.int64)])
    for n, source in enumerate(chosen):  # of a layer that is not emptied at once its beginning goes
        used = distinct(joined[joined >> 32 == n] & 0xFFFFFFFF, entries[source])
        gone = counts[make_id(LAYER, source.digest.hex())]
        if gone < len(used):
            joined[(joined >> 32 == n) & ((joined & 0xFFFFFFFF) >= used[gone])] = -1
    unique, first = np.unique(joined, return_index=True)
    first, unique = first[unique >= 0], unique[unique >= 0]
    owner = np.zeros(len(joined), np.bool_)
    owner[first] = True
    place = (np.cumsum(owner) - 1)[first]
    cuts = np.split(owner, np.cumsum([len(part) for part in keys])[:-1]) if keys else []
    owned = [(name, mine.select(mask)) for (name, mine), mask in zip(picked, cuts, strict=True)]
    moves = {s: (unique[unique >> 32 == n] & 0xFFFFFFFF, place[unique >> 32 == n]) for n, s in enumerate(chosen)}
    return _Selection([(name, mine.pages) for name, mine in owned], _in_a_row([m for _, m in owned], chosen), moves)


def _in_a_row(maps: Sequence[PageMap], sources: Sequence[Source]) -> PageMap:
    """Return the pages of several maps one after the other: their numbers mean nothing any more."""
    number = {source: 1 + n for n, source in enumerate(sources)}
    tables = [np.array([0, *(number.get(source, 0) for source in one.sources)], np.int32) for one in maps]
    source = np.concatenate([table[one.source] for table, one in zip(tables, maps, strict=True)])
    position = np.concatenate([one.position for one in maps])
    return PageMap(len(source), np.arange(len(source), dtype=np.uint32), source, position, tuple(sources))


def rest_s(busy_s: float) -> float:
    """Return for how long the disk is left to others after it was busy with a piece of a joined layer: half of the time, and
    not for ever when it is so busy that a piece takes seconds. Pure."""
    return min(busy_s, _REST_MAX_S)


class _Stopped(Exception):
    """The store is being closed."""


class _Content:
    """A joined layer on its way: its pages, asked for in order by the thread that packs them, and its frames, written by another.
    `go_on` waits while others go first, and for so many seconds besides; it may raise."""

    def __init__(
        self, snapshot: OpenSnapshot, content: PageMap, reading: WorkPool, draft: Draft, go_on: Callable[[float], None]
    ) -> None:  # fmt: skip
        self._snapshot = snapshot
        self._content = content
        self._reading = reading
        self._draft = draft
        self._go_on = go_on
        self._start = 0
        self._held: PageData = np.empty((0, 0), np.uint8)
        self._pending = 0  # bytes written and not yet on the disk
        self.prints = np.empty(content.count, np.uint64)

    def pages(self, low: int, high: int) -> PageData:
        """Return the content of these slots, a frame."""
        if high > self._start + len(self._held):
            self._go_on(0.0)
            crash_point("joining.window")
            self._start, end = low, max(high, min(low + _WINDOW_PAGES, self._content.count))
            self._held = self._snapshot.read_pages(self._content.select(slice(low, end)), {})
            self.prints[low:end] = fingerprints(self._held, np.arange(len(self._held)), self._reading)
        return self._held[low - self._start : high - self._start]

    def write(self, frame: bytes) -> None:
        """Write a frame; now and then wait for the disk."""
        self._draft.write(frame)
        self._pending += len(frame)
        if self._pending >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Have the disk take what was written so far, and leave it to others for a while."""
        began = time.monotonic()
        self._draft.flush()
        self._pending = 0
        self._go_on(rest_s(time.monotonic() - began))


class Joiner:
    """Joins layers of one store's snapshots in a thread of its own. Safe to use from several threads."""

    def __init__(self, blobs: BlobStore, pins: Pins, recall: Recall, *, frame_bytes: int, level: int) -> None:
        self._blobs = blobs
        self._pins = pins
        self._recall = recall
        self._frame_bytes = frame_bytes
        self._level = level
        self._state = threading.Condition()
        self._writers = 0
        self._closed = False
        self._ready: OrderedDict[str, Joined] = OrderedDict()  # by the snapshot it was made of
        self._jobs: dict[str, tuple[frozenset[str], Future[None]]] = {}  # by snapshot: the layers, and its end
        self._thread: ThreadPoolExecutor | None = None

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Leave processors and disk to a snapshot that is being taken or written."""
        with self._state:
            self._writers += 1
        try:
            yield
        finally:
            with self._state:
                self._writers -= 1
                self._state.notify_all()

    def consider(self, snapshot_id: str) -> None:
        """See whether layers of a snapshot that this process has just written should be joined, and begin it if so."""
        written = self._recall.written(snapshot_id)
        if written is None:
            return
        counts = joins([Usage(file.id, file.live, file.entries) for file in written.layers])
        if not counts:
            return
        with self._state:
            named = {Source(KIND_LAYER, bytes.fromhex(digest_of(file.id))) for file in written.layers}
            busy = any(layers & counts.keys() for layers, _ in self._jobs.values())
            waits = any(named & one.moves.keys() for one in self._ready.values())
            if self._closed or busy or waits or len(self._jobs) >= _WAITING_MAX:
                return
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "snapshot-join", partial(give_way, _NICE))
            job = partial(self._join, snapshot_id, written.maps, written.layers, counts)
            self._jobs[snapshot_id] = (frozenset(counts), self._thread.submit(job))

    def _join(
        self, snapshot_id: str, maps: Mapping[str, PageMap], layers: Sequence[FileV1], counts: Mapping[str, int]
    ) -> None:
        """Write one joined layer. What goes wrong is no error: the layers stay as they are, and are looked at again."""
        made: Joined | None = None
        try:
            with suppress(RecessError, OSError, _Stopped):
                made = self._write(snapshot_id, select(maps, layers, counts))
        finally:
            with self._state:
                if made is not None:
                    self._keep(made)
                del self._jobs[snapshot_id]
                self._state.notify_all()

    def _write(self, snapshot_id: str, selection: _Selection) -> Joined:
        count = selection.content.count
        with (
            closing(WorkPool(1, "join-read", nice=_NICE)) as reading,
            closing(WorkPool(1, "join-pack", nice=_NICE)) as packing,  # one thread: it asks for the pages in order
        ):
            snapshot = OpenSnapshot(self._blobs, snapshot_id, reading)
            draft = draft_of(self._blobs)
            try:
                content = _Content(snapshot, selection.content, reading, draft, self._go_on)
                file = build_layer(
                    selection.owners, content.pages, frame_bytes=self._frame_bytes, level=self._level, pool=packing,
                    write=content.write, ahead=_AHEAD_BATCHES,
                )  # fmt: skip
                content.flush()
                layer_id = make_id(LAYER, file.index_hash)
                self._pins.hold(keys_of(layer_id))
                crash_point("joining.before_file")
                try:
                    draft.put(key_of(layer_id))
                except Exception:
                    self._pins.release(keys_of(layer_id))
                    raise
            except Exception:
                draft.drop()
                raise
        crash_point("joining.stored")
        self._recall.note_layer(layer_id, content.prints)
        return Joined(snapshot_id, FileV1(layer_id, file.size_bytes, count, count), selection.moves)

    def _go_on(self, rest_s: float) -> None:
        """Wait for so long, and while snapshots are taken or written. Raises _Stopped when the store is being closed."""
        until = time.monotonic() + rest_s
        with self._state:
            while not self._closed:
                left = until - time.monotonic()
                if not self._writers and left <= 0:
                    return
                self._state.wait(None if self._writers else left)
            raise _Stopped

    def _keep(self, made: Joined) -> None:
        """Remember a joined layer; with too many of them forget the oldest. Under the lock."""
        if made.of in self._ready:
            self._forget(made.of)
        self._ready[made.of] = made
        while len(self._ready) > 1 and (len(self._ready) > _READY_MAX or self._ready_bytes() > _READY_BYTES_MAX):
            self._forget(next(iter(self._ready)))

    def _ready_bytes(self) -> int:
        return sum(one.file.bytes for one in self._ready.values())

    def _forget(self, snapshot_id: str) -> None:
        self._pins.release(keys_of(self._ready.pop(snapshot_id).file.id))

    def ready_for(self, layers: Iterable[FileV1], hold: Callable[[Iterable[str]], None]) -> list[Joined]:
        """Return what has been joined of these layers. `hold` is called for the keys of each before anybody may forget it."""
        named = {Source(KIND_LAYER, bytes.fromhex(digest_of(file.id))) for file in layers}
        out = []
        with self._state:
            for one in [one for one in self._ready.values() if named & one.moves.keys()]:
                hold(keys_of(one.file.id))
                there = False
                with suppress(RecessError):
                    there = self._blobs.touch(key_of(one.file.id))
                if there:
                    out.append(one)
                else:
                    self._forget(one.of)
        if out:
            crash_point("joining.held")
        return out

    def taken(self, joined: Sequence[Joined]) -> None:
        """Forget these: a durable snapshot names what it used of them, and of what it did not none of its children will."""
        if joined:
            crash_point("joining.named")
        with self._state:
            for one in joined:
                if self._ready.get(one.of) is one:
                    self._forget(one.of)

    def forget_old(self, before_s: float) -> None:
        """Forget what was joined of snapshots that are gone, or before a wall time: the sweep that follows may take it."""
        with self._state:
            for one in list(self._ready.values()):
                if not self._blobs.exists(key_of(one.of)) or self._made_s(one) < before_s:
                    self._forget(one.of)

    def _made_s(self, one: Joined) -> float:
        try:
            return self._blobs.stat(key_of(one.file.id)).modified_s
        except NotFound:
            return 0.0

    def settle(self) -> None:
        """Wait until nothing is being joined, for whoever wants to see what comes of it."""
        with self._state:
            ends = [future for _, future in self._jobs.values()]
        for future in ends:
            future.result()

    def close(self) -> None:
        """End the thread; what it is at is dropped. May be called twice."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        with self._state:
            for snapshot_id in list(self._ready):
                self._forget(snapshot_id)
