"""A pytest plugin for runs in the emulated host: what is a matter of seconds elsewhere is one of minutes there.

Only waits are longer; what the tests compare is untouched. `pytest -p tests.kvm_host.patience`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from recess.drivers.firecracker import port, start
from recess.drivers.kept import keeper
from recess.drivers.qemu import host
from recess.node import pagers
from tests.machines import ordinary_user

_SECONDS = 900.0
_TIMES = 20.0
_TEST_TIMES = 4.0
_SHORT_S = 1.0  # below that a test waits for something not to happen


def longer(seconds: float | None) -> float | None:
    """Return how long to wait there for what may take so long elsewhere. Pure."""
    return seconds if seconds is None or seconds < _SHORT_S else seconds * _TIMES


def pytest_configure() -> None:
    """Raise the bounds: those that programs are given to start, and those that are waited with."""
    make_patient()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's own time limit is longer, too."""
    for item in items:
        if (mark := item.get_closest_marker("timeout")) and mark.args:
            item.add_marker(pytest.mark.timeout(mark.args[0] * _TEST_TIMES), append=False)


def make_patient() -> None:
    """Do so in this process; a story that is played in another is played by this module."""
    ordinary_user._PLAYER, ordinary_user._LIMIT_S = "tests.kvm_host.patience", _SECONDS
    pagers._NURSERY_S = _SECONDS
    pagers.READY_S = _SECONDS
    keeper._START_TIMEOUT_S = _SECONDS
    port._LEAVE_TIMEOUT_S = _SECONDS
    start._API_S = _SECONDS
    host._TINY_GUEST_S = host._DEADLINE_S = _SECONDS
    timeout, wait_for = asyncio.timeout, asyncio.wait_for

    def patient_wait_for(fut: Any, timeout: float | None) -> Any:
        return wait_for(fut, longer(timeout))

    asyncio.timeout = lambda delay: timeout(longer(delay))
    asyncio.wait_for = patient_wait_for


if __name__ == "__main__":
    make_patient()
    ordinary_user.main(sys.argv[1], *map(Path, sys.argv[2:]))
