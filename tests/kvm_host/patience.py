"""A pytest plugin for runs in the emulated host: what is a matter of seconds elsewhere is one of minutes there.

Only waits for programs to start are longer; what the tests compare is untouched. `pytest -p tests.kvm_host.patience`.
"""

from __future__ import annotations

from recess.drivers.firecracker import port, start
from recess.drivers.qemu import keeper
from recess.node import pagers

_SECONDS = 900.0


def pytest_configure() -> None:
    """Raise the bounds."""
    pagers._NURSERY_S = _SECONDS
    pagers.READY_S = _SECONDS
    keeper._START_TIMEOUT_S = _SECONDS
    port._LEAVE_TIMEOUT_S = _SECONDS
    start._API_S = _SECONDS
