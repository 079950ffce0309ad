"""Before a long sleep: have the guest give up its page cache, so that it is not stored.

What is dropped was read from the disk or the image and is read again when it is needed: a smaller snapshot now for slower
first reads after the resume. So it is a knob (`drop_caches`), and off. The kernel zeroes what it frees (`init_on_free`), and
pages of zeros cost nothing. Never by a balloon: it would punch holes into a template that others stand on.
"""

from __future__ import annotations

import asyncio
import contextlib

from recess.errors import GuestFailed, NotFound, Timeout
from recess.guestlink.link import ExecRequest, GuestLink

WAIT_S = 10.0
_SCRIPT = "sync; echo 3 > /proc/sys/vm/drop_caches"


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
        with contextlib.suppress(NotFound, GuestFailed, Timeout):
            await job.signal(9)
        return False
    finally:
        with contextlib.suppress(NotFound, GuestFailed, Timeout):
            await link.forget(job.job_id)
