"""Sessions whose node is gone: another one takes their leases when these have ended, and drives them from there.

Every node asks now and then; nodes that ask at once get different sessions. A session that was put away has no owner and needs
nobody until something comes for it: whoever takes the message wakes it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from recess.errors import RecessError

if TYPE_CHECKING:
    from recess.sessions.service import Sessions

log = logging.getLogger(__name__)

AT_ONCE = 8  # sessions of a dead node that one node takes in one go: the others take theirs meanwhile


async def take_over(sessions: Sessions) -> None:
    """Look for such sessions for ever."""
    while True:
        try:
            taken = await sessions.take_abandoned(AT_ONCE)
        except RecessError as exc:
            log.warning("sessions of other nodes are not looked for: %s", exc.message)
            taken = []
        if len(taken) < AT_ONCE:
            await sessions.rest_between_looks()
