"""What a scrape of this node finds: figures read from rows when they are asked for, so none of them can be stale."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from typing import TYPE_CHECKING

from recess.sessions.counters import Sample
from recess.sessions.states import STATES
from recess.version import __version__

if TYPE_CHECKING:
    from recess.node.local import LocalNode


async def gauges(node: LocalNode) -> list[Sample]:
    """Return them. Sessions that are closed are not counted: there is no end of them."""
    about = node.info()
    sessions = Counter(row.state for row in await node.sessions.list_sessions())
    machines = Counter(row.state for row in await node.machines.list_machines(everything=True))
    disk = await asyncio.to_thread(shutil.disk_usage, node.config.blobs_dir)
    traffic = about["store"]["traffic"]
    return [
        Sample("recess_info", (("driver", str(about["driver"])), ("version", __version__)), 1),
        *(Sample("recess_sessions", (("state", one),), sessions[one]) for one in STATES if one != "closed"),
        Sample("recess_sessions_live", (), node.sessions.live),
        *(Sample("recess_machines", (("state", one),), count) for one, count in sorted(machines.items())),
        Sample("recess_snapshots", (), len(await node.catalog.snapshots.all_ids())),
        Sample("recess_disk_free_bytes", (), disk.free),
        Sample("recess_store_read_bytes_total", (), traffic["read_bytes"]),
        Sample("recess_store_written_bytes_total", (), traffic["written_bytes"]),
    ]
