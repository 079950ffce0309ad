"""What a node tidies up by itself: blobs that nothing needs, after a grace period, now and then.

It must never touch machines or sessions; their ends are noticed where they happen.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from recess.clock import Clock
from recess.errors import RecessError

log = logging.getLogger(__name__)

FIRST_S = 300.0
EVERY_S = 3600.0


async def reap(clock: Clock, collect: Callable[[], Awaitable[Mapping[str, int]]]) -> None:
    """Collect garbage for ever; a failed round (a corrupt manifest stops a sweep) is logged and tried again later."""
    await clock.sleep(FIRST_S)
    while True:
        try:
            swept = await collect()
            log.info("garbage collected: %s", dict(swept))
        except RecessError as exc:
            log.warning("garbage was not collected: %s", exc.message)
        await clock.sleep(EVERY_S)
