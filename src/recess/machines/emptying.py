"""Before a long sleep: have the guest give up its page cache, so that it is not stored.

What is dropped was read from the disk or the image and is read again when it is needed: a smaller snapshot now for slower
first reads after the resume. So it is a knob (`drop_caches`), and off; what it buys is in docs/internals/codec.md. The kernel
zeroes what it frees (`init_on_free`), and pages of zeros cost nothing. Never by a balloon: it would punch holes into a
template that others stand on.

    drop_caches = "off" | "always" | a duration    of every machine that is put away, or only of those not used for that long
"""

from __future__ import annotations

import asyncio
import contextlib

from recess.errors import BadInput, GuestFailed, IllegalState, NotFound, Timeout
from recess.guestlink.link import ExecRequest, GuestLink
from recess.units import parse_duration

WAIT_S = 10.0
OFF, ALWAYS = "off", "always"
_WORDS = {OFF: None, "false": None, "": None, ALWAYS: 0.0, "true": 0.0}
_SCRIPT = "sync; echo 3 > /proc/sys/vm/drop_caches"


def parse_policy(text: str) -> float | None:
    """Return how long a machine must have been idle when it is put away, None: never. Raises BadInput."""
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    try:
        return parse_duration(word)
    except BadInput as exc:
        raise BadInput(f"drop_caches: {exc.message}", hint='"off", "always", or a duration like 10m') from exc


def should_drop(policy: float | None, *, idle_s: float, goes_on: bool, runs: bool) -> bool:
    """Decide it: only a machine that is put away, that could be asked, and that has been idle for long enough. Pure."""
    return policy is not None and not goes_on and runs and idle_s >= policy


async def drop_caches(link: GuestLink) -> bool:
    """Drop clean pages, entries and inodes; tell whether it was done. The workload must run: this runs in it.

    A guest without a shell, one that is too slow or silent sleeps with its caches.
    """
    try:
        job = await link.exec(ExecRequest(argv=["sh", "-c", _SCRIPT], cwd="/", label="drop-caches"))
    except (NotFound, GuestFailed, Timeout):
        return False
    try:
        async with asyncio.timeout(WAIT_S):
            return await job.wait() == 0
    except (TimeoutError, GuestFailed, Timeout):
        with contextlib.suppress(NotFound, GuestFailed, Timeout, IllegalState):  # it may just have ended
            await job.signal(9)
        return False
    finally:
        # One that was killed in the middle of its writing may not have ended yet: it is left in the guest's list.
        with contextlib.suppress(NotFound, GuestFailed, Timeout, IllegalState):
            await link.forget(job.job_id)
