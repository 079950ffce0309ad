"""Named points at which a test can make this process die: a no-op unless armed.

A crash point stands where a crash would be most awkward: between two steps that only together are one act. Calling
`crash_point("snapshot.before_manifest")` costs one dictionary test. Arming happens through `recess.testing.crash`
(in-process: `Crashed` is raised) or by `Config.crash_point` (`kill`: SIGKILL, as real as it gets).

Names are literals of the form `room.step`, so that a test can list them all. This module knows of nothing else.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass


class Crashed(BaseException):
    """An in-process crash. Not an `Exception`: clean-up code that a real crash would skip must not run on it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"crashed at {name}")
        self.name = name


@dataclass
class _Armed:
    kill: bool
    skip: int


_armed: dict[str, _Armed] = {}
_lock = threading.Lock()


def crash_point(name: str) -> None:
    """Die here if `name` is armed; else do nothing."""
    if _armed:
        _fire(name)


def _fire(name: str) -> None:
    with _lock:
        armed = _armed.get(name)
        if armed is None:
            return
        if armed.skip > 0:
            armed.skip -= 1
            return
        del _armed[name]
    if armed.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    raise Crashed(name)


def arm(name: str, *, kill: bool = False, skip: int = 0) -> None:
    """Die at the next passing of `name`, after letting `skip` passings go. `kill`: SIGKILL instead of `Crashed`."""
    with _lock:
        _armed[name] = _Armed(kill, skip)


def arm_from_config(value: str) -> None:
    """Arm what `Config.crash_point` names: "" (nothing), "NAME" or "NAME:SKIP". Always by SIGKILL."""
    if value:
        name, _, skip = value.partition(":")
        arm(name, kill=True, skip=int(skip or 0))


def is_armed(name: str) -> bool:
    """Tell whether nobody has passed this armed point yet."""
    return name in _armed


def disarm_all() -> None:
    """Forget every armed point."""
    with _lock:
        _armed.clear()
