"""Frames of layers on their way: read in the order in which they will be needed, near ones by one request, each once.

Whoever needs a frame gets it as soon as the request that brings it is answered, not when all that was asked for is there.
A frame whose request has not begun is not waited for: who needs it makes that request himself. One that nobody expected
brings its neighbours along where the store is far (a request costs more than what lies around it), and they wait here.

What goes wrong with a request that was made ahead is nobody's error: who needs the frame reads it alone, and gets it then.
It must know no pages of any machine, and no store.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from recess.blobs.ranges import GAP_BYTES, join_ranges
from recess.errors import RecessError
from recess.frames.pool import give_way
from recess.paging.book import Pages
from recess.snapshots.layer_v1 import LayerReader

READY_MAX = 512
"""Frames kept, of those that are expected and of neighbours each: 32 MiB as snapshots are written. Readers stop when there is
no room; the oldest neighbours go, and are read again if they are needed."""

_NICE = 5  # of the readers: the machine, and who answers its faults, go first

_Key = tuple[int, int]  # layer, frame


@dataclass(frozen=True)
class Manner:
    """How a store is read. `readers`: requests at a time; `frames`: in one request at most; `gap_bytes`: what is read for
    nothing between two frames rather than asking twice; `around_bytes`: how much lies around a frame that comes with it."""

    readers: int
    frames: int
    gap_bytes: int
    around_bytes: int


NEAR = Manner(readers=1, frames=8, gap_bytes=0, around_bytes=0)
FAR = Manner(readers=8, frames=64, gap_bytes=GAP_BYTES, around_bytes=128 << 10)


@dataclass
class _Request:
    """Frames that come together. `asked`: the one that the whole is counted for, if somebody needed one."""

    layer: int
    frames: list[int]
    asked: int = -1
    begun: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class FramesAhead:
    """Frames of these layers (by number). `wanted`: of each the frames that somebody may ask for, ascending. Safe to use
    from several threads."""

    def __init__(
        self, layers: Mapping[int, LayerReader], wanted: Mapping[int, NDArray[np.int64]], manner: Manner
    ) -> None:
        self._layers = layers
        self._manner = manner
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(manner.readers, "ahead", partial(give_way, _NICE))
        self._queue: deque[_Request] = deque()
        self._coming: dict[_Key, _Request] = {}
        self._ready: dict[_Key, tuple[Pages, int]] = {}
        self._neighbours: dict[_Key, tuple[Pages, int]] = {}
        self._under_way = 0  # frames of the requests that readers have begun
        self._left = {number: np.zeros(layer.frame_count, bool) for number, layer in layers.items()}
        for number, frames in wanted.items():
            self._left[number][frames] = True

    def expect(self, frames: Sequence[_Key]) -> None:
        """Begin to read these, in the order in which they will be needed; returns at once."""
        with self._lock:
            requests = self._plan([key for key in dict.fromkeys(frames) if self._absent(key)])
            self._queue.extend(requests)
        for _ in requests:
            self._readers.submit(self._next)

    def get(self, layer: int, frame: int) -> tuple[Pages, int]:
        """Return a frame's pages, and the stored bytes that came for it. Raises Corrupt, NotFound, Unavailable."""
        key = (layer, frame)
        with self._lock:
            request = None if self._there(key) else self._coming.get(key) or self._around(layer, frame)
            mine = request is not None and not request.begun
            if request is not None:
                request.begun = True
        if request is not None:
            if mine:
                self._read(request)
            request.done.wait()
        with self._lock:
            self._left[layer][frame] = False
            found = self._ready.pop(key, None) or self._neighbours.pop(key, None)
            more = bool(self._queue) and self._room()
        if more:  # a reader may have stopped for want of room
            self._readers.submit(self._next)
        return found or (self._layers[layer].frame(frame), self._layers[layer].frame_bytes(frame))

    def close(self) -> None:
        """End the readers. May be called twice."""
        with self._lock:
            self._queue.clear()
        self._readers.shutdown(cancel_futures=True)

    def _absent(self, key: _Key) -> bool:
        layer, frame = key
        return bool(self._left[layer][frame]) and not self._there(key) and key not in self._coming

    def _there(self, key: _Key) -> bool:
        return key in self._ready or key in self._neighbours

    def _room(self) -> bool:
        return len(self._ready) + self._under_way < READY_MAX

    def _plan(self, keys: Sequence[_Key]) -> list[_Request]:
        """Return the requests that bring these, the one first that brings what is needed first; they are on their way."""
        found: list[tuple[int, _Request]] = []
        by_layer: dict[int, list[tuple[int, int]]] = {}
        for rank, (number, frame) in enumerate(keys):
            by_layer.setdefault(number, []).append((rank, frame))
        for number, mine in by_layer.items():
            spans = [self._layers[number].frame_span(frame) for _, frame in mine]
            for joined in join_ranges(spans, gap_bytes=self._manner.gap_bytes):
                places = [place for place, _, _ in joined.wanted]
                for low in range(0, len(places), self._manner.frames):
                    some = [mine[place] for place in places[low : low + self._manner.frames]]
                    found.append((min(some)[0], _Request(number, [frame for _, frame in some])))
        requests = [request for _, request in sorted(found, key=lambda one: one[0])]
        for request in requests:
            self._coming |= {(request.layer, frame): request for frame in request.frames}
        return requests

    def _around(self, number: int, frame: int) -> _Request:
        """Return the request for a frame that nobody expected, and for its absent neighbours."""
        layer, frames = self._layers[number], [frame]
        if self._manner.around_bytes:
            near, half = layer.frames_within(frame, self._manner.around_bytes), self._manner.frames // 2
            near = range(
                max(near.start, frame - half), min(near.stop, frame + half)
            )  # they may be tiny, and unpack to much
            frames = [one for one in near if one == frame or self._absent((number, one))]
        request = _Request(number, frames, asked=frame)
        self._coming |= {(number, one): request for one in frames}
        return request

    def _next(self) -> None:
        """Make the next request that nobody has made yet, if there is room for what it brings."""
        with self._lock:
            while self._queue and self._queue[0].begun:
                self._queue.popleft()
            if not self._queue or not self._room():
                return
            request = self._queue.popleft()
            request.begun = True
            self._under_way += len(request.frames)
        try:
            self._read(request)
        finally:
            with self._lock:
                self._under_way -= len(request.frames)

    def _read(self, request: _Request) -> None:
        layer = self._layers[request.layer]
        found: dict[int, Pages] = {}
        try:
            found = layer.frames(request.frames)
        except RecessError:
            pass  # who needs one of them reads it alone
        finally:
            with self._lock:
                for frame in request.frames:
                    self._coming.pop((request.layer, frame), None)
                    if frame in found:
                        self._keep(request, frame, found[frame])
                while len(self._neighbours) > READY_MAX:
                    del self._neighbours[next(iter(self._neighbours))]
            request.done.set()

    def _keep(self, request: _Request, frame: int, pages: Pages) -> None:
        """Lay a frame down for whoever needs it. The bytes of a request that somebody waits for count for what he asked for."""
        layer = self._layers[request.layer]
        if request.asked < 0:
            self._ready[request.layer, frame] = pages, layer.frame_bytes(frame)
        elif frame == request.asked:
            self._ready[request.layer, frame] = pages, sum(map(layer.frame_bytes, request.frames))
        else:
            self._neighbours[request.layer, frame] = pages, 0
