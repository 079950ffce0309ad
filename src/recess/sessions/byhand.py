"""A human takes a session over: its turn is stopped, no other begins, its machine stays theirs until they hand it back.

It works also where no agent would start (code that dies at once, a disk that is full): nothing here needs one. Messages are
durable and wait meanwhile. Both acts are commands of the session's actor; the row's meta is what a crash leaves of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recess.errors import IllegalState

if TYPE_CHECKING:
    from recess.sessions.supervisor import Supervisor

WHY_MAX = 500
META = "by_hand"


async def take(sup: Supervisor, why: str) -> None:
    """Begin (a command). A second one changes the reason only."""
    sup.by_hand = why[:WHY_MAX] or "a human works in the machine"
    await sup.save_meta(**{META: sup.by_hand})
    await sup.answering()


async def hand_back(sup: Supervisor) -> None:
    """End (a command): what waits begins. Raises IllegalState if nobody has taken it."""
    if not sup.by_hand:
        raise IllegalState(f"session {sup.session} was not taken over: there is nothing to hand back")
    sup.by_hand, sup.ended_job, sup.agent_failed = "", None, False
    await sup.save_meta(**{META: ""})
    sup.touch()
