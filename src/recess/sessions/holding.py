"""Which snapshots sessions need: told to whoever tidies up snapshots, as plain ids. It must never delete anything itself.

`current`: what a session that is not closed would wake from. `logged`: what its log names since a given time, rewound
branches included: a fork or a rewind may want to go back there. A log that cannot be read raises, so that nothing is
tidied up in ignorance.
"""

from __future__ import annotations

from recess.contextlog.contract import ContextLog, SessionRow
from recess.machines.retention import Holds

SESSIONS_MAX = 1_000_000
PAGE = 500


async def snapshot_holds(log: ContextLog, since: float) -> Holds:
    """Return what all sessions need; `since` in wall seconds. Reads of each log only what is younger than that."""
    current: dict[str, str] = {}
    logged: dict[str, str] = {}
    closed: set[str] = set()
    for row in await log.list_sessions(limit=SESSIONS_MAX):
        name = f"session {row.name or row.id}"
        if row.state == "closed":
            closed.add(row.id)
            continue
        if row.snapshot:
            current.setdefault(row.snapshot, name)
        for snapshot, position in await _logged(log, row, since):
            logged.setdefault(snapshot, f"{name} at position {position} of its log")
    return Holds(current, logged, frozenset(closed))


async def _logged(log: ContextLog, row: SessionRow, since: float) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    upper = row.head
    while upper > 0:
        entries = await log.read(row.id, after=max(0, upper - PAGE), to=upper, limit=PAGE)
        for entry in entries:
            if entry.kind == "machine.snapshot" and entry.ts >= since:
                found.append((str(entry.body.get("snapshot", "")), entry.position))
        if not entries or entries[0].ts < since:
            break
        upper = entries[0].position - 1
    return found
