"""A few threads for compression, decompression and hashing, all of which release the GIL."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


class WorkPool:
    """Runs short, independent, non-nesting tasks. Threads start on first use and end with `close` or the process.

    `nice`: their priority, 0 to 19, the lowest (a task that is alone runs in its caller's thread, though).
    """

    def __init__(self, threads: int = 2, name: str = "frames", *, nice: int = 0) -> None:
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, name, partial(give_way, nice) if nice else None)
        self._lock = threading.Lock()
        self._cpu_s = 0.0

    @property
    def cpu_s(self) -> float:
        """Processor seconds that its threads have spent so far (a task that the caller's own thread ran is the caller's)."""
        with self._lock:
            return self._cpu_s

    def _timed(self, task: Callable[[], T]) -> T:
        began = time.thread_time()
        try:
            return task()
        finally:
            spent = time.thread_time() - began
            with self._lock:
                self._cpu_s += spent

    def each(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run all and return their results in order.

        When one fails, the others are still waited for before its error is raised: tasks write into the caller's
        buffers, and none may do so after this returned.
        """
        if len(tasks) <= 1:
            return [task() for task in tasks]
        futures = [self._executor.submit(self._timed, task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]

    def in_order(self, tasks: Sequence[Callable[[], T]], *, ahead: int | None = None) -> Generator[T, None, None]:
        """Run all, and yield their results in order, each as soon as it and those before it are there. Whoever stops
        listening, and whoever gets an error, has waited for all of them as with `each`. `ahead`: how many may be begun
        before the first of them has been taken."""
        if len(tasks) == 1:
            yield tasks[0]()
            return
        waiting = iter(tasks)
        futures = deque(self._executor.submit(self._timed, task) for task in islice(waiting, ahead))
        try:
            while futures:
                result = futures[0].result()
                futures.popleft()
                futures.extend(self._executor.submit(self._timed, task) for task in islice(waiting, 1))
                yield result
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End the threads. May be called twice."""
        self._executor.shutdown()


TURN_S = 0.0005


def take_short_turns(seconds: float = TURN_S) -> None:
    """Have the threads of this process hand the interpreter on after so long, if another wants it (Python's own 5 ms are as long
    as a whole standstill). Beside threads that compute, whoever has something to answer waits for that. Never lengthens it."""
    sys.setswitchinterval(min(seconds, sys.getswitchinterval()))


def give_way(nice: int = 19) -> None:
    """Give this thread a low priority, the lowest if not told (on Linux a thread has its own, and cannot raise it)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
