"""What a node tidies up by itself, now and then: snapshots that its policy lets go, blobs that nothing needs.

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


async def reap(clock: Clock, tidy: Callable[[], Awaitable[Mapping[str, int]]]) -> None:
    """Tidy up for ever; a failed round (a corrupt manifest stops a sweep) is logged and tried again later."""
    await clock.sleep(FIRST_S)
    while True:
        try:
            swept = await tidy()
            log.info("tidied up: %s", dict(swept))
        except RecessError as exc:
            log.warning("not tidied up: %s", exc.message)
        await clock.sleep(EVERY_S)
