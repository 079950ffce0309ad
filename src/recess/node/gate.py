"""The broker's gate of a node: machines of sessions answer to their lease, all others may go out.

An epoch says which is which: a session's machine always runs under the epoch of a claim (1 or more), a plain machine
under 0. Until the sessions room is there, machines with an epoch are refused: the gate fails closed.
"""

from __future__ import annotations

from recess.broker import Gate, OpenGate


class NodeGate:
    """Fulfils `recess.broker.Gate`."""

    def __init__(self) -> None:
        self._plain = OpenGate()
        self._sessions: Gate | None = None

    def bind(self, sessions: Gate) -> None:
        """Say who answers for machines of sessions."""
        self._sessions = sessions

    def may_act(self, machine_id: str, epoch: int) -> bool:
        """Tell whether an outside call may start now."""
        if epoch == 0:
            return self._plain.may_act(machine_id, epoch)
        return self._sessions is not None and self._sessions.may_act(machine_id, epoch)

    async def wait_lost(self, machine_id: str, epoch: int) -> None:
        """Return once `may_act` is False for this pair."""
        if epoch == 0:
            await self._plain.wait_lost(machine_id, epoch)
        elif self._sessions is not None:
            await self._sessions.wait_lost(machine_id, epoch)
