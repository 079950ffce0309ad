"""Volumes of machines: when host and machine exchange what changed, and what becomes of it.

A VM with a mounted share of the host (9p, virtiofs) cannot be snapshotted by QEMU, and what a frozen machine saw there
would be another when it wakes. So a volume is a copy: brought in before the main process starts, exchanged both ways at every
thaw, before `suspend`, when the main process has ended, before `stop`, and by `recess sync`. `recess.volumes` decides
what goes where; nothing is overwritten that somebody else changed.

Crash-safe without a journal: files appear by rename, on either side; what both sides agreed on is noted after them, and the
note's mark left in the machine last. A crash in between leaves the note before: the next exchange finds equal files on both
sides and settles them. A machine whose disk may have lost its newest writes (a cold boot nobody prepared) is met as a
stranger: then nothing is removed anywhere, and what differs is kept twice. A read-only volume is sealed in the machine after
every exchange; a server that dies in between leaves at worst a single file unsealed, until the next exchange.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recess.catalog.machines import MachineRecord
from recess.crashpoints import crash_point
from recess.errors import BadInput, GuestFailed, IllegalState, InvalidSpec, NotFound, RecessError, Timeout, Unsupported
from recess.guestlink.link import Sealer
from recess.machines.exchange import Exchange, Report
from recess.machines.guestfiles import GuestSide
from recess.machines.live import Live
from recess.machines.parts import Parts
from recess.machines.service import MachineSpec, Mount
from recess.volumes import History, HostSide, NamedVolumes, Pair, Seen
from recess.volumes.history import MARK_CHARS, new_mark

MARK_PATH = "/var/lib/recess/volumes"
ANSWER_S = 5.0
EXCHANGE_S = 300.0  # all volumes of one machine together
FOLDER = "volumes"  # in the machine's own: what was agreed on

log = logging.getLogger(__name__)


@dataclass
class _State:
    """What is known of one machine's volumes while they are exchanged."""

    seen: Seen | None
    mounts: dict[str, Mapping[str, Pair]] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)


class Mounting:
    """The volumes of this node's machines. Calls about one machine expect its lock to be held."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._busy: dict[str, asyncio.Lock] = {}

    def check(self, spec: MachineSpec) -> MachineSpec:
        """Return the spec with its volumes' sources as they are meant: real paths, or names that exist from now on.
        Raises BadInput, NotFound, InvalidSpec. May block shortly."""
        return replace(spec, volumes=tuple(self._checked(mount) for mount in spec.volumes))

    def _checked(self, mount: Mount) -> Mount:
        if not mount.source.startswith("/"):
            self._named().ensure(mount.source)
            return mount
        path = Path(mount.source)
        if "\0" in mount.source or path.resolve() == Path("/"):
            raise InvalidSpec("a volume is a folder of the host, not all of it")
        try:
            with HostSide(path.resolve()):
                return replace(mount, source=str(path.resolve()))
        except OSError as exc:
            raise BadInput(f"{path}: {exc.strerror}") from exc

    def _named(self) -> NamedVolumes:
        if self._parts.volumes is None:
            raise InvalidSpec("this node keeps no named volumes", hint="give a folder by its absolute path")
        return self._parts.volumes

    def _path(self, mount: Mount) -> Path:
        return Path(mount.source) if mount.source.startswith("/") else self._named().path(mount.source)

    # --- when -------------------------------------------------------------------------------------------------

    async def lay(self, live: Live, record: MachineRecord) -> str:
        """Bring a new machine's volumes in before its main process starts: what its image has there makes way, but for
        what an empty named volume takes over. Returns what to say about them, "" for nothing. Raises whatever keeps them from
        being there."""
        if not live.spec.volumes:
            return ""
        state = _State(None)
        async with asyncio.timeout(EXCHANGE_S):
            for mount in live.spec.volumes:
                await self._exchange(live, record, mount, state, fresh=True)
            await self._agree(live, record, state, at_rest=False)
        return "; ".join(await self._seal(live))

    async def meet(self, live: Live, record: MachineRecord, *, cold: bool) -> str:
        """Exchange after a thaw or a cold boot; returns what to say about it, "" for nothing. A failure is told, never
        raised: the machine has its files as they were."""
        reports = await self._suppressed(live, record, cold=cold)
        bad = [r for r in reports if r.error]
        conflicts = sum(len(r.conflicts) for r in reports)
        words = [f"volume {r.target}: not exchanged ({r.error})" for r in bad] + await self._seal(live)
        return "; ".join(words + ([f"volumes: {conflicts} conflicts (recess events)"] if conflicts else []))

    async def give_back(self, live: Live, *, at_rest: bool = False) -> None:
        """Exchange before a machine goes away, if it can be asked. `at_rest`: its disk is written to the end after this.
        A failure is told, never raised: what was not brought back is in its snapshot, or on its disk."""
        if not live.spec.volumes or live.paused_since or live.stalled or live.gone.is_set():
            return
        try:
            await live.link.ping(ANSWER_S)  # a guest that is stuck keeps nobody
            record = await self._parts.catalog.machines.get(live.id)
        except RecessError as exc:
            log.warning("machine %s: its volumes were not exchanged: %s", live.id, exc.message)
            return
        await self._suppressed(live, record, at_rest=at_rest)
        await self._seal(live)

    async def sync(self, live: Live, record: MachineRecord) -> list[Report]:
        """Exchange because somebody asked, held volumes too. Raises IllegalState without volumes, or when it is paused."""
        if not live.spec.volumes:
            raise IllegalState(f"machine {record.name} has no volumes", hint="recess run -v HOST:GUEST")
        if live.paused_since:
            raise IllegalState(f"machine {record.name} is paused", hint="let it run first: recess unpause")
        try:
            return await self._all(live, record, asked=True)
        finally:
            await self._seal(live)

    # --- how --------------------------------------------------------------------------------------------------

    async def _suppressed(
        self, live: Live, record: MachineRecord, *, cold: bool = False, at_rest: bool = False
    ) -> list[Report]:
        if all(mount.held for mount in live.spec.volumes):
            return []
        try:
            return await self._all(live, record, cold=cold, at_rest=at_rest)
        except RecessError as exc:
            log.warning("machine %s: its volumes were not exchanged: %s", record.id, exc.message)
            self._parts.tell("sync", record.id, record.name, error=exc.message)
            return [Report("", "volumes", error=exc.message)]

    async def _all(
        self, live: Live, record: MachineRecord, *, asked: bool = False, cold: bool = False, at_rest: bool = False
    ) -> list[Report]:
        try:
            async with asyncio.timeout(EXCHANGE_S):
                seen = await self._last(live, record)
                if cold and seen is not None and not seen.at_rest:
                    seen = None  # its disk may lack what was written last
                state = _State(seen, dict(seen.mounts) if seen is not None else {})
                for mount in live.spec.volumes:
                    if asked or not mount.held:
                        await self._try(live, record, mount, state)
                await self._agree(live, record, state, at_rest=at_rest)
        except TimeoutError as exc:
            raise Timeout(f"the volumes of machine {record.name} took more than {EXCHANGE_S:g} s") from exc
        return state.reports

    async def _try(self, live: Live, record: MachineRecord, mount: Mount, state: _State) -> None:
        """One volume that cannot be exchanged does not keep the others from it."""
        try:
            await self._exchange(live, record, mount, state)
        except (GuestFailed, Timeout):
            raise  # nor could the next
        except RecessError as exc:
            state.reports.append(Report(mount.source, mount.target, error=exc.message))
        except OSError as exc:
            why = f"{exc.filename or mount.source}: {exc.strerror}"
            state.reports.append(Report(mount.source, mount.target, error=why))

    async def _exchange(
        self, live: Live, record: MachineRecord, mount: Mount, state: _State, *, fresh: bool = False
    ) -> None:
        path = self._path(mount)
        async with self._busy.setdefault(str(path), asyncio.Lock()):  # machines that share it take turns
            with await asyncio.to_thread(HostSide, path) as host:
                spool = self._parts.directory(record.id)
                await asyncio.to_thread(spool.mkdir, parents=True, exist_ok=True)
                place = mount.target if fresh else await self._behind(live, mount, single=bool(host.single))
                guest = GuestSide(live.link, mount.target, single=bool(host.single), spool=spool, place=place)
                if fresh and not await asyncio.to_thread(_takes_over, mount, host):
                    await guest.clear()
                stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._parts.clock.wall_s()))
                work = Exchange(
                    host, guest, mount, tags=(f"host-{stamp}", f"{record.name[:60]}-{stamp}"),
                    shared=live.spec.user not in ("", "root", "0"),
                )  # fmt: skip
                before = state.mounts.get(mount.target) if state.seen is not None else None
                state.mounts[mount.target] = await work.run(before)
                state.reports.append(work.report)

    # --- read-only --------------------------------------------------------------------------------------------

    async def _behind(self, live: Live, mount: Mount, *, single: bool) -> str:
        """Return where the host writes a volume in the machine: at its place, or behind what it has sealed there. A file is
        unsealed for the exchange, and sealed again with all others after it."""
        if not mount.readonly or not isinstance(live.link, Sealer):
            return mount.target
        try:
            if not single:
                return await live.link.seal(mount.target)
            await live.link.unseal(mount.target)
        except (NotFound, Unsupported):
            pass  # the place was removed, or this machine seals nothing: it is as open to the host as to everybody
        return mount.target

    async def _seal(self, live: Live) -> list[str]:
        """Make the read-only volumes so for the machine itself; return what to say of those that could not be. Never raises: what
        is written in there goes nowhere, whether its writer is told so or not."""
        words = []
        for mount in live.spec.volumes:
            if not mount.readonly:
                continue
            try:
                if not isinstance(live.link, Sealer):
                    raise Unsupported("its driver's machines mount nothing")
                await live.link.seal(mount.target)
            except RecessError as exc:
                words.append(
                    f"volume {mount.target}: what is written there inside is not refused, only lost ({exc.message})"
                )
        return words

    async def _last(self, live: Live, record: MachineRecord) -> Seen | None:
        """Return the agreement that the machine's files stem from, by the mark it carries: its own, or the one of the
        machine that it was made from."""
        try:
            mark = (await live.link.read_file(MARK_PATH, MARK_CHARS)).decode("ascii", "replace")
        except (NotFound, BadInput):
            return None
        origin = record.meta.get("origin", {})
        for machine_id in (record.id, str(origin.get("machine", ""))):
            if machine_id:
                history = History(self._parts.directory(machine_id) / FOLDER)
                seen = await asyncio.to_thread(history.load, mark)
                if seen is not None:
                    return seen
        return None

    async def _agree(self, live: Live, record: MachineRecord, state: _State, *, at_rest: bool) -> None:
        crash_point("volumes.copied")
        now = Seen(new_mark(), at_rest, state.mounts)
        await asyncio.to_thread(History(self._parts.directory(record.id) / FOLDER).save, now)
        crash_point("volumes.noted")
        await live.link.write_file(MARK_PATH, now.mark.encode(), 0o600)
        for report in state.reports:
            if report.moved or report.conflicts or report.error:
                self._parts.tell("sync", record.id, record.name, **asdict(report))


def _takes_over(mount: Mount, host: HostSide) -> bool:
    """Tell whether what an image has at a volume's place goes into it: Docker's rule for a named one that is empty."""
    return not mount.source.startswith("/") and not host.scan(mount.size_bytes, tidy=False).tree


def summary(reports: list[Report]) -> dict[str, Any]:
    """Return what an exchange did as JSON."""
    return {"volumes": [asdict(report) for report in reports]}
