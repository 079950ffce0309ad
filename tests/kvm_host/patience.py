"""A pytest plugin for runs in the emulated host: what is a matter of seconds elsewhere is one of minutes there.

Only waits are longer; what the tests compare is untouched. `pytest -p tests.kvm_host.patience`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from recess.drivers.firecracker import port, start
from recess.drivers.qemu import keeper
from recess.node import pagers

_SECONDS = 900.0
_TIMES = 20.0
_SHORT_S = 1.0  # below that a test waits for something not to happen


def longer(seconds: float | None) -> float | None:
    """Return how long to wait there for what may take so long elsewhere. Pure."""
    return seconds if seconds is None or seconds < _SHORT_S else seconds * _TIMES


def pytest_configure() -> None:
    """Raise the bounds: those that programs are given to start, and those that are waited with."""
    pagers._NURSERY_S = _SECONDS
    pagers.READY_S = _SECONDS
    keeper._START_TIMEOUT_S = _SECONDS
    port._LEAVE_TIMEOUT_S = _SECONDS
    start._API_S = _SECONDS
    timeout, wait_for = asyncio.timeout, asyncio.wait_for

    def patient_wait_for(fut: Any, timeout: float | None) -> Any:
        return wait_for(fut, longer(timeout))

    asyncio.timeout = lambda delay: timeout(longer(delay))
    asyncio.wait_for = patient_wait_for
