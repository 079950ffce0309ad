"""The life of stored snapshots after they were taken: removed on request, pruned by policy, swept, and what they cost.

Order of every removal: the row first, in one transaction with whatever pointed to it, then the manifest, then files that
nobody else needs. A crash in between leaves bytes that no row names, which the sweep finds; never a row without bytes.
Doubt keeps: a row that cannot be read still names its id, and a manifest that cannot be read stops the sweep.

It must never know of the context log: what sessions need is told through `bind` as plain ids (`retention.Holds`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from recess.catalog.machines import TABLE as MACHINES
from recess.catalog.machines import update_in as update_machine_in
from recess.catalog.snapshots import SnapshotRecord, tag_in, untag_in
from recess.catalog.snapshots import delete_in as delete_snapshot_in
from recess.catalog.snapshots import update_in as update_snapshot_in
from recess.crashpoints import crash_point
from recess.db import Tx
from recess.errors import BadInput, Corrupt, HasDependents, Incompatible, NotFound, OutOfSpace, RecessError
from recess.machines.fleet import Fleet
from recess.machines.parts import Parts
from recess.machines.retention import (
    AUTOMATIC,
    Candidate,
    Doomed,
    Holds,
    Keeping,
    beyond_last,
    missing_bytes,
    no_room,
    prunable,
)
from recess.machines.states import SUSPENDED

log = logging.getLogger(__name__)

COLLECT_GRACE_S = 600.0
Held = Callable[[float], Awaitable[Holds]]


async def _nothing_held(_since: float) -> Holds:
    return Holds()


@dataclass(frozen=True)
class Removed:
    """What one removal gave back. `names`: what it was called."""

    id: str
    names: tuple[str, ...]
    why: str
    bytes: int


class SnapshotKeeping:
    """The keeper of a node's snapshots. `bind` before the first prune or sweep, or what sessions need is not known."""

    def __init__(self, parts: Parts, fleet: Fleet) -> None:
        self._parts = parts
        self._fleet = fleet
        self._held: Held = _nothing_held
        self._tidying = asyncio.Lock()

    def bind(self, held: Held) -> None:
        """Say who tells what is needed above: called with the wall time since which the log's snapshots count."""
        self._held = held

    # --- what is needed ----------------------------------------------------------------------------------------

    async def holds(self) -> Holds:
        """Return what the room above needs now, and what its logs name within the retention."""
        return await self._held(self._parts.clock.wall_s() - self._parts.keeping.retention_s)

    async def _candidates(self, holds: Holds) -> list[Candidate]:
        catalog = self._parts.catalog
        records, names = await catalog.snapshots.readable(), await catalog.snapshots.names()
        machines = await catalog.db.read(lambda tx: tx.execute("SELECT id, snapshot, session FROM catalog_machine"))
        # What a living VM's pages are compared with is needed too: the next snapshot would be the whole machine again.
        newest = {str(m["snapshot"]) for m in machines} | {live.parent for live in self._fleet.all()}
        alive = {str(m["id"]) for m in machines}
        found = []
        for one in records:
            living = one.session not in holds.closed if one.session else one.machine in alive
            found.append(Candidate(
                one.id, one.session or one.machine, one.created, one.why in AUTOMATIC, one.id in names,
                needed=one.id in newest or one.id in holds.current, wanted=one.id in holds.logged, series_alive=living,
                expires=one.expires,
            ))  # fmt: skip
        return found

    # --- removing ----------------------------------------------------------------------------------------------

    async def remove(self, ref: str, *, force: bool = False) -> Removed:
        """Forget a snapshot and give its bytes back at once. Raises HasDependents naming who needs it; `force` takes
        one that is only a place to go back to, or whose files others share (they keep what they share), and one whose
        row or manifest is damaged. What a suspended machine or a session would come back from is never taken."""
        snapshot_id, name = await self._id_of(ref, force)
        holds = await self.holds()
        needs = [holds.current[snapshot_id]] if snapshot_id in holds.current else []
        hint = "remove those first"
        if not needs and not force:
            needs = [holds.logged[snapshot_id]] if snapshot_id in holds.logged else []
            needs += [f"snapshot {one[:16]}" for one in await self._dependents(snapshot_id)]
            hint = "remove those first, or use --force: they keep what they share"
        if needs:
            raise _needed(name or snapshot_id[:16], needs, hint)
        return await self._take_out(snapshot_id, "removed")

    async def _id_of(self, ref: str, force: bool) -> tuple[str, str]:
        try:
            row = await self._parts.catalog.snapshots.get(ref)
            return row.id, row.name
        except Corrupt:
            if force and ref in await self._parts.catalog.snapshots.all_ids():
                return ref, ""
            raise

    async def _dependents(self, snapshot_id: str) -> list[str]:
        ids = await self._parts.catalog.snapshots.all_ids()
        return await asyncio.to_thread(self._parts.store.dependents, snapshot_id, ids)

    async def _take_out(self, snapshot_id: str, why: str) -> Removed:
        catalog = self._parts.catalog
        names = (await catalog.snapshots.names()).get(snapshot_id, [])
        parent = await catalog.db.write(lambda tx: _take_out_in(tx, snapshot_id))
        crash_point("keeping.row_deleted")
        self._reparent(snapshot_id, parent)
        return Removed(snapshot_id, tuple(names), why, await self.discard_bytes(snapshot_id))

    async def discard_bytes(self, snapshot_id: str) -> int:
        """Delete what a snapshot without a row alone needs; return the bytes. In doubt it is left to the sweep."""
        if self._parts.at_hand is not None:
            self._parts.at_hand.drop(snapshot_id)
        try:
            counts = await asyncio.to_thread(self._parts.store.discard, snapshot_id)
        except RecessError as exc:
            log.warning("snapshot %s is left to the sweep: %s", snapshot_id[:16], exc.message)
            return 0
        return counts["bytes"]

    async def cancel(self, machine_id: str, snapshot_id: str) -> None:
        """Take back a snapshot that came to nothing (a message cancelled the freeze): the machine's row is as before.
        The bytes go at once, but aside: who waits here has work to do. Expects the machine's lock to be held; one that
        is gone, or of another machine, is left alone. Raises HasDependents for what a suspended machine needs."""

        def run(tx: Tx) -> str | None:
            row = tx.one("SELECT machine FROM catalog_snapshot WHERE id = ?", (snapshot_id,))
            return None if row is None or row["machine"] != machine_id else _take_out_in(tx, snapshot_id)

        parent = await self._parts.catalog.db.write(run)
        if parent is not None:
            crash_point("keeping.cancelled")
            self._reparent(snapshot_id, parent)
            self._fleet.aside(self._drop(snapshot_id))

    async def _drop(self, snapshot_id: str) -> None:
        await self.discard_bytes(snapshot_id)

    def _reparent(self, gone: str, parent: str) -> None:
        for live in self._fleet.all():
            if live.parent == gone:
                live.parent = parent

    # --- names and times ---------------------------------------------------------------------------------------

    async def tag(self, ref: str, name: str) -> tuple[SnapshotRecord, str]:
        """Give a snapshot a further name; return it, and the id the name pointed to before ("" if to none)."""
        catalog, now = self._parts.catalog, self._parts.clock.wall_s()
        row = await catalog.snapshots.get(ref)
        before = await catalog.db.write(lambda tx: tag_in(tx, row.id, name, now=now))
        return await catalog.snapshots.get(row.id), before

    async def untag(self, name: str) -> None:
        """Take a name away; the snapshot stays. Raises NotFound."""
        if not await self._parts.catalog.db.write(lambda tx: untag_in(tx, name)):
            raise NotFound(f"no such name of a snapshot: {name}", hint="recess snapshots ls", kind="snapshot", ref=name)

    async def expire(self, snapshot_id: str, ttl_s: float) -> None:
        """Let a snapshot go this many seconds from now, named or not; 0: never. Something that needs it keeps it."""
        if ttl_s < 0:
            raise BadInput(f"ttl: a time to live cannot be {ttl_s} seconds")
        expires = self._parts.clock.wall_s() + ttl_s if ttl_s else 0.0
        await self._parts.catalog.db.write(lambda tx: update_snapshot_in(tx, snapshot_id, expires=expires))

    # --- the policy --------------------------------------------------------------------------------------------

    async def prune(
        self, *, keep_last: int | None = None, older_than_s: float | None = None, everything: bool = False,
        dry_run: bool = False,
    ) -> list[Removed]:  # fmt: skip
        """Remove what the policy lets go (see `retention`); the arguments change it for this once. Oldest first."""
        policy = self._parts.keeping
        if keep_last is not None:
            policy = replace(policy, keep_last=keep_last)
        if older_than_s is not None:
            policy = replace(policy, retention_s=older_than_s)
        async with self._tidying:
            holds = await self.holds()
            doomed = prunable(
                await self._candidates(_since(holds, older_than_s)), now=self._parts.clock.wall_s(), keeping=policy,
                everything=everything,
            )  # fmt: skip
            if dry_run:
                names = await self._parts.catalog.snapshots.names()
                return [Removed(one.id, tuple(names.get(one.id, ())), one.why, 0) for one in doomed]
            return await self._take_all(doomed)

    async def keep_newest(self, series: str, keep_last: int) -> list[Removed]:
        """Remove the unnamed snapshots of a machine or session beyond its newest `keep_last`."""
        if keep_last < 1:
            raise BadInput(f"keep-last: at least 1, not {keep_last}")
        async with self._tidying:
            return await self._take_all(beyond_last(await self._candidates(await self.holds()), series, keep_last))

    async def _take_all(self, doomed: Sequence[Doomed], *, enough: int | None = None) -> list[Removed]:
        out: list[Removed] = []
        for one in doomed:
            if enough is not None and sum(gone.bytes for gone in out) >= enough:
                break
            try:
                out.append(await self._take_out(one.id, one.why))
            except HasDependents:
                continue  # a machine was put away on it since we looked
        return out

    async def make_room(self, *, refuse: bool) -> None:
        """Before a snapshot is taken: when the quota is used up or the disk's reserve touched, prune as far as the
        policy allows under pressure. Raises OutOfSpace if that was not enough (only with `refuse`)."""
        missing = await self._missing()
        if missing and self._parts.at_hand is not None:
            await asyncio.to_thread(self._parts.at_hand.give_back, missing)  # it can be had again from the store
            missing = await self._missing()
        if not missing:
            return
        async with self._tidying:
            missing = await self._missing()
            doomed = prunable(
                await self._candidates(await self.holds()), now=self._parts.clock.wall_s(),
                keeping=self._parts.keeping, pressed=True,
            )  # fmt: skip
            await self._take_all(doomed, enough=missing)
            if await self._missing() and refuse:
                used, free = await self._space()
                raise OutOfSpace(
                    no_room(self._parts.keeping, used=used, free=free),
                    hint="recess snapshots tree shows what frees how much; recess snapshots prune --all, rm",
                )

    async def _space(self) -> tuple[int, int | None]:
        free = self._parts.free_bytes
        used = await asyncio.to_thread(self._parts.store.used_bytes) if self._parts.keeping.quota_bytes else 0
        return used, free() if free is not None else None

    async def _missing(self) -> int:
        used, free = await self._space()
        return missing_bytes(self._parts.keeping, used=used, free=free)

    # --- the sweep ---------------------------------------------------------------------------------------------

    async def collect(self, *, grace_s: float = COLLECT_GRACE_S) -> Mapping[str, int]:
        """Sweep blobs that nothing needs and that are older than the grace period.

        Needed is what any row names, readable or not, every template, and what machines, sessions and, within the
        retention, their logs refer to, if it is still there. Raises Corrupt, NotFound, Incompatible, BadInput before anything is deleted
        when a snapshot that has a row cannot be read: what it needs is unknown.
        """
        catalog, holds = self._parts.catalog, await self.holds()

        def roots(tx: Tx) -> tuple[list[str], list[str]]:
            templates = [str(row["manifest"]) for row in tx.execute("SELECT manifest FROM catalog_template")]
            # A machine's template too: its own row may have been made anew since, under another manifest.
            machines = tx.execute("SELECT snapshot, template FROM catalog_machine")
            return templates, [str(row[c]) for row in machines for c in ("snapshot", "template") if row[c]]

        templates, newest = await catalog.db.read(roots)
        live = [*await catalog.snapshots.all_ids(), *templates]
        wanted = [*newest, *holds.current, *holds.logged]
        if self._parts.at_hand is not None:
            await asyncio.to_thread(self._parts.at_hand.keep_only, [*live, *wanted])
        now = self._parts.clock.wall_s()
        try:
            return await asyncio.to_thread(
                lambda: self._parts.store.collect(live, grace_s=grace_s, now=now, wanted=wanted)
            )
        except (Corrupt, NotFound, Incompatible, BadInput) as exc:
            exc.hint = exc.hint or "nothing was deleted; give a damaged snapshot up with recess snapshots rm ID --force"
            raise

    async def tidy(self) -> Mapping[str, int]:
        """Prune by the policy, sweep, recompress: what a node does by itself now and then. Returns counts and bytes."""
        pruned = await self.prune()
        swept = await self.collect()
        packed = await self.recompress()
        freed = swept["bytes"] + sum(one.bytes for one in pruned) + packed["bytes"]
        return {**swept, **packed, "pruned": len(pruned), "bytes": freed}

    async def recompress(self) -> Mapping[str, int]:
        """Compress what sleeps long once more, by the policy. Returns counts; a caller that goes away ends it soon."""
        stopped, now = threading.Event(), self._parts.clock.wall_s()
        work = asyncio.create_task(asyncio.to_thread(
            self._parts.store.recompress, self._parts.keeping.recompression, now=now, stopped=stopped.is_set,
            tell=log.warning,
        ))  # fmt: skip
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stopped.set()
            await asyncio.wait({work})  # the store is closed after us
            raise

    @property
    def policy(self) -> Keeping:
        """The node's policy."""
        return self._parts.keeping


def _since(holds: Holds, older_than_s: float | None) -> Holds:
    """With a time of the caller's own, the log's wishes of the node's policy do not count."""
    return holds if older_than_s is None else replace(holds, logged={})


def _needed(what: str, needs: Sequence[str], hint: str) -> HasDependents:
    return HasDependents(
        f"snapshot {what} is needed by {', '.join(needs[:5])}" + (f" and {len(needs) - 5} more" if len(needs) > 5 else ""),
        hint=hint, dependents=list(needs),
    )  # fmt: skip


def _take_out_in(tx: Tx, snapshot_id: str) -> str:
    """Delete a row and return its parent; machines that it was the newest snapshot of fall back to their next older
    one. Raises HasDependents: a suspended machine has nothing else."""
    row = tx.one("SELECT parent FROM catalog_snapshot WHERE id = ?", (snapshot_id,))
    parent = "" if row is None else str(row["parent"])
    for machine in tx.execute("SELECT id, name, state FROM catalog_machine WHERE snapshot = ?", (snapshot_id,)):
        if machine["state"] == SUSPENDED:
            raise _needed(
                snapshot_id[:16], [f"machine {machine['name'] or machine['id']}"], "resume or remove it first"
            )
        older = tx.one(
            "SELECT id FROM catalog_snapshot WHERE machine = ? AND id <> ? ORDER BY created DESC, id DESC",
            (machine["id"], snapshot_id),
        )
        update_machine_in(tx, machine["id"], snapshot=older["id"] if older is not None else "")
    delete_snapshot_in(tx, snapshot_id)
    # What is left of machines whose pages were compared with it is compared with its parent from now on.
    for row in tx.execute("SELECT * FROM catalog_machine WHERE meta LIKE ?", (f"%{snapshot_id}%",)):
        with suppress(Corrupt):
            child = MACHINES.decode(row)
            if child.meta.get("parent") == snapshot_id:
                update_machine_in(tx, child.id, meta={**child.meta, "parent": parent})
    return parent
