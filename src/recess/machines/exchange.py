"""One exchange of one volume: both sides are looked at, `recess.volumes.plan` decides, and its steps are done here.

Order: removals (deepest first), then what goes in (one archive), then what goes out (file by file). A step that meets
something new is left for the next look and told; only a side that fails as a whole ends the exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from recess.errors import BadInput, NotFound
from recess.machines.guestfiles import GuestSide
from recess.machines.service import Mount
from recess.volumes import DIR, FILE, LINK, Entry, HostSide, Pair, Step, plan
from recess.volumes.hostside import Changed
from recess.volumes.merge import GUEST, HOST, IN, OUT, SETTLE, STUCK
from recess.volumes.trees import copied_in

TOLD_MAX = 100
OUT_AT_ONCE = 4
T = TypeVar("T")


@dataclass
class Report:
    """What one exchange of a volume did. `conflicts`: both sides had changed a path; `winner` is whose version stands,
    `kept` where the other is ("" if it was a removal). `left_out`: what was not copied, and why."""

    source: str
    target: str
    copied_in: int = 0
    copied_out: int = 0
    removed_in: int = 0
    removed_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    conflicts: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    error: str = ""

    @property
    def moved(self) -> int:
        """How many files, folders and links were copied or removed."""
        return self.copied_in + self.copied_out + self.removed_in + self.removed_out

    def leave(self, path: str, why: str) -> None:
        """Tell that a path was not copied."""
        if len(self.left_out) < TOLD_MAX:
            self.left_out.append({"path": path, "why": why})

    def conflict(self, path: str, winner: str, kept: str) -> None:
        """Tell that both sides had changed a path."""
        if len(self.conflicts) < TOLD_MAX:
            self.conflicts.append({"path": path, "winner": winner, "kept": kept})


class Exchange:
    """Does one exchange. `tags`: what a loser of the host's and of the machine's is called after; `shared`: users other than
    root write in the machine."""

    def __init__(self, host: HostSide, guest: GuestSide, mount: Mount, *, tags: tuple[str, str], shared: bool) -> None:
        self._host = host
        self._guest = guest
        self._mount = mount
        self._tags = tags
        self._shared = shared
        self._agreed: dict[str, Pair] = {}
        self._blocked: set[str] = set()
        self.report = Report(mount.source, mount.target)

    async def run(self, before: Mapping[str, Pair] | None) -> dict[str, Pair]:
        """Exchange; returns what both sides agree on now. Raises BadInput (a bound), GuestFailed, OutOfSpace, ..."""
        limit, readonly = self._mount.size_bytes, self._mount.readonly
        here = await asyncio.to_thread(self._host.scan, limit, tidy=not readonly)
        there = await self._guest.scan(limit)
        aside = {**here.left_out, **there.left_out}
        for path, why in aside.items():
            self.report.leave(path, why)
        steps, self._agreed = plan(
            None if before is None else _without(before, aside), _without(here.tree, aside),
            _without(there.tree, aside), readonly=readonly,
        )  # fmt: skip
        if before is not None:  # what cannot be looked at has not changed
            self._agreed |= {path: pair for path, pair in before.items() if path in aside}
        if there.absent:
            await self._guest.make_root()
        steps = [step for step in steps if not self._settled(step)]
        for step in sorted(steps, key=lambda step: step.path, reverse=True):
            await self._remove(step)
        await self._bring_in([step for step in steps if step.act == IN and step.path not in self._blocked])
        await self._all_out([step for step in steps if step.act == OUT])
        return self._agreed

    async def _all_out(self, steps: list[Step]) -> None:
        """Folders and links first, in order; then files, some at once."""
        for step in steps:
            if step.guest is not None and step.guest.kind != FILE:
                await self._bring_out(step, step.guest)
        room = asyncio.Semaphore(OUT_AT_ONCE)

        async def one(step: Step, guest: Entry) -> None:
            async with room:
                await self._bring_out(step, guest)

        files = [one(step, step.guest) for step in steps if step.guest is not None and step.guest.kind == FILE]
        done = await asyncio.gather(*files, return_exceptions=True)
        failed = [e for e in done if isinstance(e, BaseException)]
        if failed:
            raise failed[0]

    def _settled(self, step: Step) -> bool:
        if step.act == SETTLE:
            self._agreed[step.path] = Pair(step.host, step.guest)
        elif step.act == STUCK:
            self.report.leave(step.path, "a folder on one side, none on the other")
        return step.act in (SETTLE, STUCK)

    async def _remove(self, step: Step) -> None:
        path, host, guest = step.path, step.host, step.guest
        if step.act == IN and host is None and guest is not None:
            if await self._guest.remove(path):
                self.report.removed_in += 1
                self._told(step, HOST)
            elif guest.kind != DIR:
                self.report.leave(path, "the machine does not let it go")
        elif step.act == IN and host is not None and guest is not None and host.kind != guest.kind:
            # What was in a folder went before; it stays if the machine has put something else there meanwhile.
            if DIR in (host.kind, guest.kind) and not await self._guest.remove(path):
                self._blocked.add(path)
                self.report.leave(path, "a folder of the machine is in its way")
        elif step.act == OUT and host is not None and (guest is None or (host.kind == DIR) != (guest.kind == DIR)):
            try:
                await asyncio.to_thread(self._host.remove, path, host)
            except Changed as exc:
                if host.kind != DIR:
                    self.report.leave(path, exc.message)
                return
            self.report.removed_out += guest is None
            if guest is None:
                self._told(step, GUEST)

    async def _bring_in(self, steps: list[Step]) -> None:
        ready: list[tuple[str, Entry]] = []
        for step in steps:
            if step.host is not None and await self._save_guest(step):
                ready.append((step.path, step.host))
        if not ready:
            return
        await self._guest.put(self._host, ready, shared=self._shared)
        for path, entry in ready:
            self._agreed[path] = Pair(entry, copied_in(entry))
        self.report.copied_in += len(ready)
        self.report.bytes_in += sum(entry.size for _, entry in ready if entry.kind == FILE)

    async def _save_guest(self, step: Step) -> bool:
        """Keep the machine's version beside the host's before it is overwritten; False leaves both as they are."""
        if step.loser != GUEST or step.guest is None:
            self._told(step, HOST)
            return True
        if step.guest.kind != FILE:
            self._told(step, HOST, f"(a link to {step.guest.target})")
            return True
        try:
            with self._guest.spool() as spool:
                content = await self._guest.open_file(step.path, step.guest, spool)
                kept = await asyncio.to_thread(
                    self._host.put_beside, step.path, content, step.guest, self._tags[1], like=step.host
                )
        except (Changed, NotFound, BadInput) as exc:
            self.report.leave(step.path, f"both changed it: {exc.message}")
            return False
        self._told(step, HOST, kept)
        return True

    async def _bring_out(self, step: Step, guest: Entry) -> None:
        path, seen = step.path, step.host
        if seen is not None and (seen.kind == DIR) != (guest.kind == DIR):
            seen = None  # it made way above
        try:
            kept = ""
            if step.loser == HOST and seen is not None:
                kept = await asyncio.to_thread(self._host.put_aside, path, seen, self._tags[0])
            now = await self._write_out(path, guest, None if kept else seen, like=seen)
        except (Changed, NotFound, BadInput) as exc:
            self.report.leave(path, exc.message)
            return
        self._told(step, GUEST, kept)
        self._agreed[path] = Pair(now, guest)
        self.report.copied_out += 1
        self.report.bytes_out += now.size if now.kind == FILE else 0

    async def _write_out(self, path: str, guest: Entry, seen: Entry | None, *, like: Entry | None) -> Entry:
        if guest.kind == DIR:
            return await asyncio.to_thread(self._host.put_folder, path, seen)
        if guest.kind == LINK:
            return await asyncio.to_thread(self._host.put_link, path, guest.target, seen)
        with self._guest.spool() as spool:
            content = await self._guest.open_file(path, guest, spool)
            return await asyncio.to_thread(self._host.put_file, path, content, guest, seen, like=like)

    def _told(self, step: Step, winner: str, kept: str = "") -> None:
        if step.told:
            self.report.conflict(step.path, winner, kept)


def _without(some: Mapping[str, T], aside: Mapping[str, str]) -> Mapping[str, T]:
    return {path: one for path, one in some.items() if path not in aside} if aside else some
