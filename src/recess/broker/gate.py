"""The question every outside call must pass: may this machine, under this epoch, act on the world right now?

The broker asks; only the sessions room (leases) answers for session machines. The broker never interprets an epoch.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Gate(Protocol):
    """The fence. Both calls must be cheap and must not touch a database: at the lease's end it fails closed alone."""

    def may_act(self, machine_id: str, epoch: int) -> bool:
        """Tell whether an outside call may start now. An unknown machine or a doubtful lease is False."""
        ...

    async def wait_lost(self, machine_id: str, epoch: int) -> None:
        """Return once `may_act` has become False for this pair (at once if it is); cancelled when nobody cares.

        It may also return early; the caller asks `may_act` again.
        """
        ...


class OpenGate:
    """The gate of machines that belong to no session: there is one copy of them and nobody to fence."""

    def may_act(self, machine_id: str, epoch: int) -> bool:
        """Return True."""
        return True

    async def wait_lost(self, machine_id: str, epoch: int) -> None:
        """Never return."""
        await asyncio.Event().wait()
