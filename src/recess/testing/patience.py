"""Waiting for what another process or thread does, where there is no event to wait for. It must know nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(look: Callable[[], T], *, timeout_s: float = 30.0, every_s: float = 0.01) -> T:
    """Return the first truthy answer of `look`. Raises AssertionError with the last answer when none came in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {found!r}"
        time.sleep(every_s)
    return found
